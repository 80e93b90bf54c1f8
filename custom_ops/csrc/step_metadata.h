// A step's metadata: the C ABI of the launcher, and the same in host memory.
#pragma once

#include "lengths.h"

// One step. Shapes, types and values are those of `fd_dsa.step.ForwardMeta`; B = num_rows,
// R = num_padded_rows >= B, T = num_padded_tokens. Layout and size are part of the ABI.
extern "C" struct FdDsaStep {
  // int32 [B]; not read without windows
  const int32_t* seq_lens_encoder;
  // int32 [B]
  const int32_t* seq_lens_decoder;
  // int32 [B]; negative lengths count as 0
  const int32_t* seq_lens_this_time;
  // int32 [B, num_columns], rows `row_stride` entries apart
  const int32_t* block_tables;
  // int32 [T], int64 [T], int32 [T] or null, int64 [T]
  int32_t* batch_id_per_token;
  int64_t* position_ids;
  int32_t* position_ids_int32;
  int64_t* slot_mapping;
  // int32 [R + 1], int32 [R]
  int32_t* cu_seqlens_q;
  int32_t* cache_seqlens;
  // int32 [2 T], 8-byte aligned, and int32 [R + 1]; both null where no row is a prefill row
  int32_t* indexer_attn_mask_offsets;
  int32_t* cu_seqlens_kg;
  int64_t row_stride;
  int32_t num_rows;
  int32_t num_padded_rows;
  int32_t num_padded_tokens;
  int32_t num_columns;
  int32_t block_size;
  // largest block id of the cache
  int32_t last_block;
};

// Writes all arrays of a step whatever they held, padding included, in one launch. A table entry
// that is no block of the cache gives slot -1; lengths that no step has stay inside the arrays.
// Returns a cudaError_t, 0 = success. Allocates nothing, waits for nothing.
extern "C" int fd_dsa_step_metadata_cuda(const FdDsaStep* step, void* stream);

namespace fd_dsa {

// Cache slot of a position of a row; -1 where its table has no block of the cache for it.
inline int64_t slot_cpu(const FdDsaStep& s, const int32_t* table, int32_t position) {
  const int32_t column = position / s.block_size;
  if (position < 0 || column >= s.num_columns) return -1;
  const int32_t block = table[column];
  if (block < 0 || block > s.last_block) return -1;
  return static_cast<int64_t>(block) * s.block_size + position % s.block_size;
}

inline void write_token_cpu(const FdDsaStep& s, int32_t token, int32_t row, int32_t position,
                            int64_t slot) {
  s.batch_id_per_token[token] = row;
  s.position_ids[token] = position;
  if (s.position_ids_int32 != nullptr) s.position_ids_int32[token] = position;
  s.slot_mapping[token] = slot;
}

inline void write_window_cpu(const FdDsaStep& s, int32_t token, int32_t start, int32_t end) {
  if (s.indexer_attn_mask_offsets == nullptr) return;
  s.indexer_attn_mask_offsets[2 * static_cast<int64_t>(token)] = start;
  s.indexer_attn_mask_offsets[2 * static_cast<int64_t>(token) + 1] = end;
}

inline void step_metadata_cpu(const FdDsaStep& s) {
  const bool has_windows = s.indexer_attn_mask_offsets != nullptr;
  int32_t token = 0, end = 0, keys = 0;
  s.cu_seqlens_q[0] = 0;
  if (has_windows) s.cu_seqlens_kg[0] = 0;
  for (int32_t row = 0; row < s.num_padded_rows; ++row) {
    const bool exists = row < s.num_rows;
    const int32_t length =
        exists ? bounded(s.seq_lens_this_time[row], s.num_padded_tokens) : 0;
    const int32_t cached = exists ? s.seq_lens_decoder[row] : 0;
    const bool is_prefill = exists && has_windows && s.seq_lens_encoder[row] > 0;
    const int32_t first_key = keys;
    const int32_t* table = s.block_tables + (exists ? row * s.row_stride : 0);
    for (int32_t j = 0; j < length && token < s.num_padded_tokens; ++j, ++token) {
      const int32_t position = wrapping_add(cached, j);
      write_token_cpu(s, token, row, position, slot_cpu(s, table, position));
      const int32_t last_key = wrapping_add(wrapping_add(first_key, position), 1);
      write_window_cpu(s, token, is_prefill ? first_key : 0, is_prefill ? last_key : 0);
    }
    end = wrapping_add(end, length);
    keys = wrapping_add(keys, is_prefill ? wrapping_add(cached, length) : length);
    s.cu_seqlens_q[row + 1] = end;
    if (has_windows) s.cu_seqlens_kg[row + 1] = keys;
    s.cache_seqlens[row] = length > 0 && !is_prefill ? wrapping_add(cached, length) : 0;
  }
  for (; token < s.num_padded_tokens; ++token) {
    write_token_cpu(s, token, -1, 0, -1);
    write_window_cpu(s, token, 0, 0);
  }
}

}  // namespace fd_dsa
