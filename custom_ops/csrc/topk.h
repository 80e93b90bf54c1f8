// Exact top-k of rows of scores: the C ABI of the launchers, and the same in host memory.
//
// A score ranks by higher value, then by lower position; NaN is below every number, -0.0 equals
// +0.0. The chosen positions come in ascending order, -1 fills what a short row leaves. The result
// is a function of the scores alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "lengths.h"

// Positions of the k best of the first lengths[r] scores of each row.
//
// logits: float32 [num_rows, width], rows `row_stride` floats apart; what lies at or past a row's
//   length is not looked at.
// lengths: int32 [num_rows]; below 0 counts as 0, above `width` as `width`.
// positions: int32 [num_rows, k].
// Returns a cudaError_t, 0 = success. Allocates nothing, waits for nothing.
extern "C" int fd_dsa_topk_cuda(const float* logits, const int32_t* lengths, int32_t* positions,
                                int32_t num_rows, int32_t width, int64_t row_stride, int32_t k,
                                void* stream);

// The same for consecutive tokens of a step, as slots of a paged cache.
//
// Row r is token t = first_token + r; it sees the positions 0..position_ids[t] of its request, none
// where batch_ids[t] < 0, and up to k positions are taken without a look at the scores.
// position_ids: int64 [num_tokens]; batch_ids: int32 [num_tokens].
// block_tables: int32 [num_reqs, table_width]; a position past it, or whose block is outside
//   0..num_blocks - 1, has slot -1.
// groups: int32 [num_tokens] or null; rows of tokens of another group than `group` stay untouched.
// slots: int32 [num_tokens, k].
extern "C" int fd_dsa_topk_slots_cuda(const float* logits, const int64_t* position_ids,
                                      const int32_t* batch_ids, const int32_t* block_tables,
                                      const int32_t* groups, int32_t* slots, int32_t num_rows,
                                      int32_t width, int64_t row_stride, int32_t k,
                                      int32_t first_token, int32_t table_width, int32_t block_size,
                                      int32_t num_blocks, int32_t group, void* stream);

namespace fd_dsa::topk {

// Order-preserving image of the bits of a float32: larger = better; 0 for NaN.
FD_DSA_BOTH uint32_t image_of_bits(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if (bits == 0x80000000u) bits = 0;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// Where the scores, lengths and outputs of all rows are; `lengths` or the arrays of tokens.
struct Rows {
  const float* logits;
  const int32_t* lengths;
  const int64_t* position_ids;
  const int32_t* batch_ids;
  const int32_t* block_tables;
  const int32_t* groups;
  int32_t* out;
  int64_t row_stride;
  int32_t num_rows, width, k;
  int32_t first_token, table_width, block_size, num_blocks, group;
};

// The row of the output, or -1 where it is to be left alone.
FD_DSA_BOTH int64_t token_of(const Rows& rows, int32_t row) {
  const int64_t token = static_cast<int64_t>(rows.first_token) + row;
  return rows.groups != nullptr && rows.groups[token] != rows.group ? -1 : token;
}

// How many positions a token may choose from.
FD_DSA_BOTH int32_t window_of(const Rows& rows, int64_t token) {
  if (rows.lengths != nullptr) return bounded(rows.lengths[token], rows.width);
  if (rows.batch_ids[token] < 0) return 0;
  const int32_t window = bounded(wrapping_add(static_cast<int32_t>(rows.position_ids[token]), 1),
                                 0x7fffffff);
  return window > rows.k ? bounded(rows.width, window) : window;
}

// What stands in the output for a position.
FD_DSA_BOTH int32_t entry_of(const Rows& rows, int64_t token, int32_t position) {
  if (rows.lengths != nullptr) return position;
  const int32_t column = position / rows.block_size;
  if (column >= rows.table_width) return -1;
  const int64_t row = rows.batch_ids[token];
  const int32_t block = rows.block_tables[row * rows.table_width + column];
  if (block < 0 || block >= rows.num_blocks) return -1;
  return block * rows.block_size + position % rows.block_size;
}

inline void topk_cpu(const Rows& rows) {
  std::vector<uint64_t> keys;
  std::vector<int32_t> chosen;
  for (int32_t row = 0; row < rows.num_rows; ++row) {
    const int64_t token = token_of(rows, row);
    if (token < 0) continue;
    const int32_t window = window_of(rows, token), take = std::min(window, rows.k);
    chosen.resize(take);
    for (int32_t i = 0; i < take; ++i) chosen[i] = i;
    if (window > rows.k) {
      keys.resize(window);
      for (int32_t i = 0; i < window; ++i) {
        uint32_t bits;
        std::memcpy(&bits, rows.logits + row * rows.row_stride + i, sizeof(bits));
        keys[i] = static_cast<uint64_t>(image_of_bits(bits)) << 32 | ~static_cast<uint32_t>(i);
      }
      std::nth_element(keys.begin(), keys.begin() + take - 1, keys.end(), std::greater<uint64_t>());
      for (int32_t i = 0; i < take; ++i) chosen[i] = static_cast<int32_t>(~static_cast<uint32_t>(keys[i]));
      std::sort(chosen.begin(), chosen.end());
    }
    int32_t* out = rows.out + token * rows.k;
    for (int32_t i = 0; i < take; ++i) out[i] = entry_of(rows, token, chosen[i]);
    std::fill(out + take, out + rows.k, -1);
  }
}

}  // namespace fd_dsa::topk
