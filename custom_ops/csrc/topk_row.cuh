// Top-k: one row of scores, as a block reads it.
#pragma once

#include "topk_block.cuh"

namespace fd_dsa::topk {

// What the host tells a kernel.
struct Job {
  Rows rows;
  Sizes sizes;
  int32_t block_shift;  // of a block size that is a power of two; else -1
};

__device__ __forceinline__ float no_score() { return __uint_as_float(0x7fffffffu); }

__device__ __forceinline__ uint32_t image_of(float score) {
  return image_of_bits(__float_as_uint(score));
}

// The score of an image; NaN for 0.
__device__ __forceinline__ float score_of(uint32_t image) {
  return __uint_as_float((image >> 31) != 0 ? image ^ 0x80000000u : ~image);
}

// The row that a block works on. Chunks are 16 bytes at 16-byte addresses, all of them of the row;
// up to three scores lie before the first one, and behind the last.
struct Row {
  const float* scores;
  int64_t token;
  int32_t length, lead, num_chunks;

  __device__ __forceinline__ Row(const Rows& rows, int32_t row)
      : scores(rows.logits + row * rows.row_stride), token(rows.first_token + int64_t{row}) {
    if (rows.lengths != nullptr) {
      length = bounded(rows.lengths[token], rows.width);
    } else {
      // all loads before the first decision
      const int32_t batch_id = rows.batch_ids[token];
      const int32_t last = static_cast<int32_t>(rows.position_ids[token]);
      length = window_at(rows, batch_id, last);
    }
    const auto address = reinterpret_cast<uintptr_t>(scores);
    lead = min(static_cast<int32_t>((16 - address % 16) % 16 / sizeof(float)), length);
    num_chunks = (length - lead) / 4;
  }

  __device__ __forceinline__ int32_t first_of(int32_t chunk) const { return chunk * 4 + lead; }

  __device__ __forceinline__ float4 load(int32_t chunk) const {
    return __ldg(reinterpret_cast<const float4*>(scores + first_of(chunk)));
  }
};

// `entry_of` without a division where it can be.
__device__ __forceinline__ int32_t entry_at(const Job& job, int64_t token, int32_t position) {
  const Rows& rows = job.rows;
  if (rows.lengths != nullptr || job.block_shift < 0) return entry_of(rows, token, position);
  const int32_t column = position >> job.block_shift;
  if (column >= rows.table_width) return -1;
  const int64_t request = rows.batch_ids[token];
  const int32_t block = __ldg(rows.block_tables + request * rows.table_width + column);
  if (block < 0 || block >= rows.num_blocks) return -1;
  return (block << job.block_shift) + (position & ((1 << job.block_shift) - 1));
}

}  // namespace fd_dsa::topk
