// Which row a token belongs to: sums of the rows' tokens in shared memory, searched by each token.
#pragma once

#include "common.cuh"
#include "lengths.h"

namespace fd_dsa {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Pair {
  int32_t first, second;
};

__device__ __forceinline__ Pair add(Pair a, Pair b) {
  return {wrapping_add(a.first, b.first), wrapping_add(a.second, b.second)};
}

// Sum of the values of this lane and the lanes below it.
__device__ __forceinline__ Pair warp_prefix(Pair value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Pair below = {__shfl_up_sync(kAllLanes, value.first, step),
                        __shfl_up_sync(kAllLanes, value.second, step)};
    if (lane >= step) value = add(value, below);
  }
  return value;
}

// Sums over the threads of a block: those below this one, and all. Every thread calls it; the
// caller puts a barrier between two calls.
template <int kThreads>
struct BlockSums {
  Pair below, all;

  __device__ __forceinline__ BlockSums(Pair value, Pair* of_warps) {
    constexpr int kWarps = kThreads / kWarp;
    const int warp = threadIdx.x / kWarp;
    const Pair up_to = warp_prefix(value);
    if (threadIdx.x % kWarp == kWarp - 1) of_warps[warp] = up_to;
    __syncthreads();
    below = {wrapping_sub(up_to.first, value.first), wrapping_sub(up_to.second, value.second)};
    all = {0, 0};
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const Pair sum = of_warps[other];
      if (other < warp) below = add(below, sum);
      all = add(all, sum);
    }
  }
};

// How many of the first `count` sums are at most `token`; they ascend.
__device__ __forceinline__ int rows_before(const int32_t* ends, int count, int32_t token) {
  int found = 0;
  for (int step = 1 << (31 - __clz(max(count, 1))); step > 0; step /= 2) {
    const int probe = found + step;
    if (probe <= count && ends[probe - 1] <= token) found = probe;
  }
  return found;
}

}  // namespace fd_dsa
