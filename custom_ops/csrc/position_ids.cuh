// Position of each token of a step, a thread a token.
//
// Source: PaddlePaddle/FastDeploy #7367, get_position_ids_and_mask_encoder_batch with its reduced
// arguments, whose kernel gives one thread to a row and serves at most 1024 rows.
#pragma once

#include "position_ids.h"
#include "rows.cuh"

namespace fd_dsa {

constexpr int kPositionThreads = 256;
// rows that a thread reads at a time
constexpr int kPositionRows = 4;
constexpr int kPositionTile = kPositionThreads * kPositionRows;

__global__ void __launch_bounds__(kPositionThreads)
    position_ids_kernel(const int32_t* __restrict__ seq_lens_decoder,
                        const int32_t* __restrict__ seq_lens_this_time,
                        int32_t* __restrict__ position_ids, int32_t num_rows,
                        int32_t num_tokens) {
  __shared__ int32_t ends[kPositionTile];
  __shared__ int32_t shifts[kPositionTile];
  __shared__ Pair of_warps[kPositionThreads / kWarp];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPositionThreads;
  const int64_t token = first + threadIdx.x;
  int32_t before = 0;
  for (int32_t tile = 0; tile < num_rows; tile += kPositionTile) {
    // all tokens of this block lie in the rows so far
    if (before >= first + kPositionThreads) return;
    int32_t lengths[kPositionRows], cached[kPositionRows], total = 0;
#pragma unroll
    for (int i = 0; i < kPositionRows; ++i) {
      const int32_t row = tile + threadIdx.x * kPositionRows + i;
      const bool exists = row < num_rows;
      lengths[i] = exists ? bounded(seq_lens_this_time[row], num_tokens) : 0;
      cached[i] = exists ? seq_lens_decoder[row] : 0;
      total = wrapping_add(total, lengths[i]);
    }
    const BlockSums<kPositionThreads> sums({total, 0}, of_warps);
    int32_t end = wrapping_add(before, sums.below.first);
#pragma unroll
    for (int i = 0; i < kPositionRows; ++i) {
      const int slot = threadIdx.x * kPositionRows + i;
      shifts[slot] = wrapping_sub(cached[i], end);
      end = wrapping_add(end, lengths[i]);
      ends[slot] = end;
    }
    __syncthreads();
    const int32_t after = wrapping_add(before, sums.all.first);
    if (token >= before && token < after && token < num_tokens) {
      const int row = rows_before(ends, min(num_rows - tile, kPositionTile), static_cast<int32_t>(token));
      if (row < kPositionTile) position_ids[token] = wrapping_add(static_cast<int32_t>(token), shifts[row]);
    }
    before = after;
    __syncthreads();
  }
}

inline int launch_position_ids(const int32_t* seq_lens_decoder, const int32_t* seq_lens_this_time,
                               int32_t* position_ids, int32_t num_rows, int32_t num_tokens,
                               void* stream) {
  if (num_rows <= 0 || num_tokens <= 0) return 0;
  const unsigned blocks = (static_cast<unsigned>(num_tokens) - 1) / kPositionThreads + 1;
  return launch(launch_config(blocks, kPositionThreads, stream), position_ids_kernel,
                seq_lens_decoder, seq_lens_this_time, position_ids, num_rows, num_tokens);
}

}  // namespace fd_dsa
