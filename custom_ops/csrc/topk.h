// Exact top-k of rows of scores: the C ABI of the launcher, the order of scores and their outputs.
#pragma once

#include "lengths.h"

// Rows of scores and their output.
//
// A score ranks by higher value, then by lower position. NaN is below every number, and -0.0 equals
// +0.0. The chosen positions come in ascending order, and -1 fills the rest of a short row. Layout
// and size are part of the ABI.
//
// With `lengths`, output row r has the positions of the k best of the first lengths[r] scores.
// Without it, row r is token t = first_token + r of a step. The token sees the positions
// 0..position_ids[t] of its request, and no position if batch_ids[t] < 0. Output row t has slots of
// a paged cache. A row with at most k positions gets all of them, and its scores are not read.
//
// With `window_offsets`, a token of a request b with seq_lens_encoder[b] > 0 sees other positions:
// from window_offsets[2 t] - key_starts[b] up to and without window_offsets[2 t + 1] -
// key_starts[b]. These are clipped to 0..key_starts[b + 1] - key_starts[b].
extern "C" struct FdDsaTopk {
  // float32 [num_rows, width], rows `row_stride` floats apart. Scores past a row's positions are
  // not read.
  const float* logits;
  // int32 [num_rows] or null; below 0 counts as 0, above `width` as `width`
  const int32_t* lengths;
  // int64 [num_tokens], int32 [num_tokens], int32 [num_reqs, table_width]. A position past the
  // table or in a block outside 0..num_blocks - 1 has slot -1.
  const int64_t* position_ids;
  const int32_t* batch_ids;
  const int32_t* block_tables;
  // int32 [2 num_tokens], int32 [num_reqs + 1], int32 [num_reqs]; or all null
  const int32_t* window_offsets;
  const int32_t* key_starts;
  const int32_t* seq_lens_encoder;
  // int32 [num_rows or num_tokens, k]
  int32_t* out;
  int64_t row_stride;
  int32_t num_rows;
  int32_t width;
  int32_t k;
  int32_t first_token;
  int32_t table_width;
  int32_t block_size;
  int32_t num_blocks;
  // 1: from Hopper on, the launch may begin before the previous one has ended, and waits for it in the
  // kernel
  int32_t starts_early;
};

// Fills `out` in one launch.
//
// Returns a cudaError_t, 0 = success. The launcher does not allocate or wait, and the result
// depends on the scores only.
extern "C" int fd_dsa_topk_cuda(const FdDsaTopk* rows, void* stream);

namespace fd_dsa::topk {

using Rows = FdDsaTopk;

// Maps the bits of a float32 to an integer of the same order: larger = better, 0 for NaN.
FD_DSA_BOTH uint32_t image_of_bits(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if (bits == 0x80000000u) bits = 0;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// Packs a score and its position: larger = better score, then lower position.
FD_DSA_BOTH uint64_t ranked(uint32_t image, int32_t position) {
  return static_cast<uint64_t>(image) << 32 | ~static_cast<uint32_t>(position);
}

FD_DSA_BOTH int32_t position_of(uint64_t key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

// The positions that a token may choose from: first position and count.
struct Window {
  int32_t first, length;
};

FD_DSA_BOTH Window window_at(const Rows& rows, int64_t token, int32_t batch_id, int32_t last) {
  Window window = {0, 0};
  if (batch_id < 0) return window;
  if (rows.window_offsets != nullptr && rows.seq_lens_encoder[batch_id] > 0) {
    const int32_t start = rows.key_starts[batch_id];
    const int32_t count = wrapping_sub(rows.key_starts[batch_id + 1], start);
    window.first = bounded(wrapping_sub(rows.window_offsets[2 * token], start), count);
    const int32_t end = bounded(wrapping_sub(rows.window_offsets[2 * token + 1], start), count);
    window.length = end > window.first ? end - window.first : 0;
  } else {
    window.length = bounded(wrapping_add(last, 1), 0x7fffffff);
  }
  if (window.length > rows.k) {
    window.length = bounded(window.length, bounded(rows.width - window.first, rows.width));
  }
  return window;
}

// Returns the output entry of a position.
FD_DSA_BOTH int32_t entry_of(const Rows& rows, int64_t token, int32_t position) {
  if (rows.lengths != nullptr) return position;
  const int32_t column = position / rows.block_size;
  if (column >= rows.table_width) return -1;
  const int64_t request = rows.batch_ids[token];
  const int32_t block = rows.block_tables[request * rows.table_width + column];
  if (block < 0 || block >= rows.num_blocks) return -1;
  return block * rows.block_size + position % rows.block_size;
}

}  // namespace fd_dsa::topk
