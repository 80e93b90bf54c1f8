// Top-k: what the threads of a block share, and what they find out together.
#pragma once

#include "topk_ptx.cuh"
#include "topk_sizes.h"

namespace fd_dsa::topk {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr int kSampleBinBits = 8;
constexpr int kSampleBins = 1 << kSampleBinBits;
// candidates that are ranked by comparing each with all others
constexpr int kSmall = 64;
// a few warps sum up bins with fewer instructions than all would take
constexpr int kScanWarps = 8;

// Shared memory of a block. Lists of other sizes lie behind it, see `Lists`.
struct alignas(16) Shared {
  uint32_t bins[kBins];
  uint32_t sample_bins[kSampleBins], sample_low[kSampleBins];
  uint64_t small[kSmall];
  uint64_t threshold;
  uint32_t warp_sums[kWarp], warp_low[kWarp], warp_high[kWarp];
  // what find_bin found: the bin, entries above it, entries in it
  uint32_t bin, above, inside;
  uint32_t num_small, bound;
  // candidates of this block, and where its own begin among all; of all of them, in rank 0
  uint32_t num_kept, sent_to, num_sent, highest;
  // of each block of the cluster
  uint32_t better_of[kMaxCluster], equal_of[kMaxCluster];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1; }

// Sum of the values of this lane and the lanes below it.
__device__ __forceinline__ uint32_t warp_prefix(uint32_t value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += below;
  }
  return value;
}

// Sum of the first `warp` sums of warps; all lanes call it.
__device__ __forceinline__ uint32_t sum_below(const Shared& shared, int warp) {
  return __reduce_add_sync(kAllLanes, lane_id() < warp ? shared.warp_sums[lane_id()] : 0);
}

// Smallest and largest of the threads' values, in all threads; without those smallest values of
// warps that are the `kSkipped` lowest.
template <int kThreads, int kSkipped = 0>
__device__ __forceinline__ void block_range(Shared& shared, uint32_t& low, uint32_t& high) {
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (lane_id() == 0) {
    shared.warp_low[warp_id()] = low;
    shared.warp_high[warp_id()] = high;
  }
  __syncthreads();
  const bool valid = lane_id() < kThreads / kWarp;
  low = valid ? shared.warp_low[lane_id()] : 0xffffffffu;
#pragma unroll
  for (int i = 0; i < kSkipped; ++i) {
    const bool least = low == __reduce_min_sync(kAllLanes, low);
    // one of equals
    if ((__ballot_sync(kAllLanes, least) & lanes_below()) == 0 && least) low = 0xffffffffu;
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, valid ? shared.warp_high[lane_id()] : 0u);
}

// Finds the bin of the `need`-th entry from the top, and empties the bins. Starts behind a barrier
// and ends with one; there are that many entries.
template <int kThreads>
__device__ __forceinline__ void find_bin(Shared& shared, uint32_t need) {
  constexpr int kWarps = kThreads / kWarp < kScanWarps ? kThreads / kWarp : kScanWarps;
  constexpr int kOwn = kBins / (kWarps * kWarp);
  const bool scans = warp_id() < kWarps;
  const int first = kBins - (static_cast<int>(threadIdx.x) + 1) * kOwn;
  uint32_t count[kOwn], sum = 0, prefix = 0;
  if (scans) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      count[i] = shared.bins[first + i];
      shared.bins[first + i] = 0;
      sum += count[i];
    }
    prefix = warp_prefix(sum);
    if (lane_id() == kWarp - 1) shared.warp_sums[warp_id()] = prefix;
  }
  __syncthreads();
  if (scans) {
    uint32_t above = sum_below(shared, warp_id()) + prefix - sum;
    if (above < need && need <= above + sum) {
#pragma unroll
      for (int i = kOwn - 1; i >= 0; --i) {
        if (above < need && need <= above + count[i]) {
          shared.bin = first + i;
          shared.above = above;
          shared.inside = count[i];
        }
        above += count[i];
      }
    }
  }
  __syncthreads();
}

}  // namespace fd_dsa::topk
