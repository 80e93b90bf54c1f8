// The position of each token of a step, with one thread per token, and the texts of errors.
//
// Source: PaddlePaddle/FastDeploy #7367, get_position_ids_and_mask_encoder_batch with its reduced
// arguments. Its kernel gives one thread to a row and serves at most 1024 rows.
#include "common.cuh"
#include "position_ids.h"

namespace fd_dsa {

constexpr int kPositionThreads = 256;
// rows per thread of a tile
constexpr int kPositionRows = 4;
constexpr int kPositionTile = kPositionThreads * kPositionRows;

// Sums over the threads of a block: over the threads below this one, and over all.
//
// Every thread calls the constructor. The caller puts a barrier between two calls.
struct BlockSums {
  int32_t below, all = 0;

  __device__ __forceinline__ BlockSums(int32_t value, int32_t* warp_sums) {
    const int warp = threadIdx.x / kWarp;
    const auto up_to = static_cast<int32_t>(warp_prefix(static_cast<uint32_t>(value)));
    if (threadIdx.x % kWarp == kWarp - 1) warp_sums[warp] = up_to;
    __syncthreads();
    below = wrapping_sub(up_to, value);
#pragma unroll
    for (int other = 0; other < kPositionThreads / kWarp; ++other) {
      const int32_t sum = warp_sums[other];
      if (other < warp) below = wrapping_add(below, sum);
      all = wrapping_add(all, sum);
    }
  }
};

// Returns the count of the first `count` ascending sums that are at most `token`.
__device__ __forceinline__ int count_rows_before(const int32_t* ends, int count, int32_t token) {
  int found = 0;
  for (int step = 1 << (31 - __clz(max(count, 1))); step > 0; step /= 2) {
    const int probe = found + step;
    if (probe <= count && ends[probe - 1] <= token) found = probe;
  }
  return found;
}

__global__ void __launch_bounds__(kPositionThreads)
    position_ids_kernel(const int32_t* __restrict__ seq_lens_decoder,
                        const int32_t* __restrict__ seq_lens_this_time,
                        int32_t* __restrict__ position_ids, int32_t num_rows,
                        int32_t num_tokens) {
  __shared__ int32_t ends[kPositionTile];
  __shared__ int32_t shifts[kPositionTile];
  __shared__ int32_t warp_sums[kPositionThreads / kWarp];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPositionThreads;
  const int64_t token = first + threadIdx.x;
  int32_t before = 0;
  for (int32_t tile = 0; tile < num_rows; tile += kPositionTile) {
    // the rows so far hold all tokens of this block
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
    const BlockSums sums(total, warp_sums);
    int32_t end = wrapping_add(before, sums.below);
#pragma unroll
    for (int i = 0; i < kPositionRows; ++i) {
      const int slot = threadIdx.x * kPositionRows + i;
      shifts[slot] = wrapping_sub(cached[i], end);
      end = wrapping_add(end, lengths[i]);
      ends[slot] = end;
    }
    __syncthreads();
    const int32_t after = wrapping_add(before, sums.all);
    if (token >= before && token < after && token < num_tokens) {
      const int32_t at = static_cast<int32_t>(token);
      const int row = count_rows_before(ends, min(num_rows - tile, kPositionTile), at);
      if (row < kPositionTile) position_ids[at] = wrapping_add(at, shifts[row]);
    }
    before = after;
    __syncthreads();
  }
}

}  // namespace fd_dsa

extern "C" int fd_dsa_position_ids_cuda(const int32_t* seq_lens_decoder,
                                        const int32_t* seq_lens_this_time, int32_t* position_ids,
                                        int32_t num_rows, int32_t num_tokens, void* stream) {
  using namespace fd_dsa;
  if (num_rows <= 0 || num_tokens <= 0) return 0;
  const unsigned blocks = (static_cast<unsigned>(num_tokens) - 1) / kPositionThreads + 1;
  return launch(launch_config(blocks, kPositionThreads, stream), position_ids_kernel,
                seq_lens_decoder, seq_lens_this_time, position_ids, num_rows, num_tokens);
}

// Returns name and text of a cudaError_t from a launcher.
extern "C" const char* fd_dsa_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
