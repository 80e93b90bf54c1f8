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

// Chunks are 16 bytes at 16-byte addresses; the first `head` floats of chunk 0 lie before the row.
struct Row {
  const float* scores;
  int64_t token;
  int32_t length, head, num_chunks;

  __device__ __forceinline__ Row(const Rows& rows, int32_t row, int64_t token)
      : scores(rows.logits + row * rows.row_stride), token(token), length(window_of(rows, token)) {
    head = static_cast<int32_t>(reinterpret_cast<uintptr_t>(scores) / sizeof(float) % 4);
    num_chunks = (head + length + 3) / 4;
  }

  __device__ __forceinline__ int32_t first_of(int32_t chunk) const { return chunk * 4 - head; }

  // Scores of a chunk; NaN for what is not of the row, or of no chunk before `end`.
  __device__ __forceinline__ float4 load(int32_t chunk, int32_t end) const {
    const int32_t first = first_of(chunk);
    if (chunk < end && first >= 0 && first + 4 <= length) {
      return __ldg(reinterpret_cast<const float4*>(scores + first));
    }
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t position = first + i;
      const bool inside = chunk < end && position >= 0 && position < length;
      value[i] = inside ? __ldg(scores + position) : no_score();
    }
    return make_float4(value[0], value[1], value[2], value[3]);
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
