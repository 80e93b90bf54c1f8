// Top-k: a bound that little more than k scores of a row exceed, and those that do.
#pragma once

#include "topk_row.cuh"

namespace fd_dsa::topk {

// Finds the bin of the `wanted`-th sample from the top; leaves its lowest sample, or `low` where
// there are fewer. For one warp.
__device__ __forceinline__ void find_sample(Shared& shared, uint32_t wanted, uint32_t low) {
  constexpr int kOwn = kSampleBins / kWarp;
  const int first = kSampleBins - (lane_id() + 1) * kOwn;
  uint32_t count[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    count[i] = shared.sample_bins[first + i];
    sum += count[i];
  }
  uint32_t above = warp_prefix(sum) - sum;
  if (lane_id() == kWarp - 1) shared.bound = low;
  __syncwarp();
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) {
    if (above < wanted && wanted <= above + count[i]) {
      shared.bound = shared.sample_low[first + i];
    }
    above += count[i];
  }
  __syncwarp();
  // zeros of both signs are one score
  if (lane_id() == 0) shared.bound = image_of(score_of(shared.bound));
}

// Image of a score that a few more than k of the row's scores exceed, from evenly spaced samples.
//
// The lowest of the best samples of groups bounds the bins from below: so they are narrow where
// the wanted sample is, and few samples are counted. The bound is a sample, not an edge of a bin:
// a plateau of equal scores is then exactly at it.
template <int kThreads, int kLoads>
__device__ __forceinline__ uint32_t choose_bound(const Row& row, int32_t k, Shared& shared) {
  constexpr int kMost = kThreads * kLoads;
  const int32_t num_chunks = min(kMost, row.num_chunks);
  // what is lowest less one, so that NaN, which is 0, does not count
  uint32_t image[4 * kLoads], best = 0, low = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int32_t index = i * kThreads + threadIdx.x;
    const int64_t spread = static_cast<int64_t>(index) * row.num_chunks / kMost;
    const int32_t chunk = row.num_chunks > kMost ? static_cast<int32_t>(spread) : index;
    const float4 four = row.load(chunk, row.num_chunks);
    const float value[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t bits = __float_as_uint(value[j]);
      const uint32_t plain = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) |
                                     0x80000000u);
      image[4 * i + j] = value[j] == value[j] ? plain : 0;
      best = max(best, image[4 * i + j]);
      low = min(low, image[4 * i + j] - 1);
    }
  }
  const float wanted = samples_above(4.0f * num_chunks, row.length, k);
  // groups so small that the worst of their best samples is below the wanted one, or none
  const float size = 2.5f * static_cast<float>(4 * num_chunks) / wanted;
  uint32_t high = best;
  if (size >= 4 * kLoads) {
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      if (size >= 8 * kLoads * lanes) best = max(best, __shfl_xor_sync(kAllLanes, best, lanes));
    }
    low = best - 1;
  }
  block_range<kThreads>(shared, low, high);
  low += 1;
  const uint32_t range = high - low;
  const int shift = max(0, 32 - __clz(range) - kSampleBinBits);
#pragma unroll
  for (int i = 0; i < 4 * kLoads; ++i) {
    const uint32_t offset = image[i] - low;
    if (offset <= range) {
      atomicAdd(&shared.sample_bins[offset >> shift], 1u);
      atomicMin(&shared.sample_low[offset >> shift], image[i]);
    }
  }
  __syncthreads();
  if (warp_id() == 0) find_sample(shared, static_cast<uint32_t>(wanted), low);
  __syncthreads();
  return shared.bound;
}

// Scores of the thread's chunks from `chunk` on, a block's width apart.
template <int kThreads, int kUnroll>
__device__ __forceinline__ void load_tile(const Row& row, int32_t chunk, int32_t end,
                                          float4 (&tile)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) tile[u] = row.load(chunk + u * kThreads, end);
}

template <int kBit>
__device__ __forceinline__ void mark_four(float4 four, float bound, uint32_t& mask) {
  mark_above<kBit>(four.x, bound, mask);
  mark_above<kBit + 1>(four.y, bound, mask);
  mark_above<kBit + 2>(four.z, bound, mask);
  mark_above<kBit + 3>(four.w, bound, mask);
}

// Bits of the scores of a tile that are above a bound.
template <int kUnroll>
__device__ __forceinline__ uint32_t above_in(const float4 (&tile)[kUnroll], float bound) {
  static_assert(kUnroll == 1 || kUnroll == 2 || kUnroll == 4);
  uint32_t mask = 0;
  mark_four<0>(tile[0], bound, mask);
  if constexpr (kUnroll > 1) mark_four<4>(tile[1], bound, mask);
  if constexpr (kUnroll > 2) {
    mark_four<8>(tile[2], bound, mask);
    mark_four<12>(tile[3], bound, mask);
  }
  return mask;
}

// Keeps the keys of scores above a bound at the back of `keys`, in any order; shared.num_kept
// counts all of them.
template <int kThreads, int kUnroll, bool kAhead>
__device__ __forceinline__ void keep_above(const Row& row, int32_t begin, int32_t end,
                                           float4 (&tile)[kUnroll], float bound, Shared& shared,
                                           uint64_t* keys, uint32_t capacity) {
  uint32_t highest = 0;
  for (; begin < end; begin += kThreads * kUnroll) {
    const int32_t chunk = begin + threadIdx.x;
    const bool more = begin + kThreads * kUnroll < end;
    float4 next[kAhead ? kUnroll : 1];
    if constexpr (kAhead) {
      if (more) load_tile<kThreads>(row, chunk + kUnroll * kThreads, end, next);
    }
    uint32_t mask = above_in(tile, bound);
    const uint32_t count = __popc(mask), prefix = warp_prefix(count);
    uint32_t at = 0;
    if (lane_id() == kWarp - 1 && prefix > 0) at = atomicAdd(&shared.num_kept, prefix);
    at = __shfl_sync(kAllLanes, at, kWarp - 1) + prefix - count;
    for (; mask != 0; mask &= mask - 1, ++at) {
      const int32_t i = __ffs(mask) - 1;
      const int32_t position = row.first_of(chunk + i / 4 * kThreads) + i % 4;
      // once more from the cache: registers have no index
      const uint32_t image = image_of(__ldg(row.scores + position));
      highest = max(highest, image);
      if (at < capacity) keys[capacity - 1 - at] = ranked(image, position);
    }
    __syncwarp();
    if constexpr (kAhead) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) tile[u] = next[u];
    } else if (more) {
      load_tile<kThreads>(row, chunk + kUnroll * kThreads, end, tile);
    }
  }
  highest = __reduce_max_sync(kAllLanes, highest);
  if (lane_id() == 0) atomicMax(&shared.highest, highest);
}

}  // namespace fd_dsa::topk
