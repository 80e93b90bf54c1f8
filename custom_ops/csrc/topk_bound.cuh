// Top-k: a bound that little more than k scores of a row exceed, and those that do.
#pragma once

#include "topk_row.cuh"

namespace fd_dsa::topk {

// Order-preserving image of a number that may be -0.0.
__device__ __forceinline__ uint32_t image_of_number(float score) {
  const uint32_t bits = __float_as_uint(score);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// `samples_above` by the fast operations of the hardware.
__device__ __forceinline__ float wanted_samples(float size, float length, float k) {
  const float scale = __fdividef(1.0f, length), share = k * scale;
  const float seen = fminf(size * scale, 1.0f);
  const float variance = fmaxf(size * share * (1.0f - share) * (1.0f - seen), 1e-6f);
  return size * share + 6.0f * variance * __frsqrt_rn(variance) + 4.0f;
}

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
  const uint32_t below = warp_prefix(sum);
  uint32_t above = below - sum;
  const bool mine = above < wanted && wanted <= below;
  if (__ballot_sync(kAllLanes, mine) == 0) {
    if (lane_id() == 0) shared.bound = image_of(score_of(low));
  } else if (mine) {
    int bin = kOwn - 1;
#pragma unroll
    for (int i = kOwn - 1; i > 0; --i) {
      above += count[i];
      if (above < wanted) bin = i - 1;
    }
    // zeros of both signs are one score
    shared.bound = image_of(score_of(shared.sample_low[first + bin]));
  }
}

// Image of a score that a few more than k of the row's scores exceed, from evenly spaced samples.
//
// The best samples of groups, but for the poorest ones, bound the bins from below: so they are
// narrow where the wanted sample is, and few samples are counted. The samples of a group come from
// all over the row: no group is poor because scores rise or fall with the position. The bound is a
// sample, not an edge of a bin: a plateau of equal scores is then exactly at it.
template <int kThreads, int kLoads>
__device__ __forceinline__ uint32_t choose_bound(const Row& row, int32_t k, Shared& shared) {
  constexpr uint32_t kMost = kThreads * kLoads;
  const uint32_t all = static_cast<uint32_t>(row.num_chunks);
  const uint32_t step = all > kMost ? all / kMost : 1, rest = all > kMost ? all % kMost : 0;
  // neighbouring lanes far apart in the row; where samples are all there is, they lie side by side
  const uint32_t spread = (__brev(lane_id()) >> 27) * (kThreads / kWarp) + warp_id();
  const uint32_t first = step > 1 ? spread : threadIdx.x;
  float4 four[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const uint32_t index = i * kThreads + first;
    const float none = no_score();
    four[i] = make_float4(none, none, none, none);
    if (index < all) four[i] = row.load(static_cast<int32_t>(index * step + index * rest / kMost));
  }
  const float size = static_cast<float>(4 * min(all, kMost));
  const float wanted = wanted_samples(size, row.length, k);
  // groups so small that the worst of their best samples is below the wanted one, or none
  const float group = __fdividef(2.5f * size, wanted);
  // what is lowest less one, so that NaN, which is 0, does not count
  uint32_t image[4 * kLoads], best = 0, low = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < 4 * kLoads; ++i) {
    const float4 one = four[i / 4];
    const float value = i % 4 == 0 ? one.x : i % 4 == 1 ? one.y : i % 4 == 2 ? one.z : one.w;
    image[i] = value == value ? image_of_number(value) : 0;
    best = max(best, image[i]);
    low = min(low, image[i] - 1);
  }
  uint32_t high = best;
  const bool grouped = group >= 4 * kLoads;
  if (grouped) {
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      if (group >= 8 * kLoads * lanes) best = max(best, __shfl_xor_sync(kAllLanes, best, lanes));
    }
    low = best - 1;
  }
  // one poor group would stretch the range over zero, where numbers have most of their images
  if (grouped) {
    block_range<kThreads, 2>(shared, low, high);
  } else {
    block_range<kThreads>(shared, low, high);
  }
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

template <int kBit>
__device__ __forceinline__ void mark_four(float4 four, float bound, uint32_t& mask) {
  mark_above<kBit>(four.x, bound, mask);
  mark_above<kBit + 1>(four.y, bound, mask);
  mark_above<kBit + 2>(four.z, bound, mask);
  mark_above<kBit + 3>(four.w, bound, mask);
}

// Scores of chunks a block's width apart, and which of them are above a bound.
template <int kThreads, int kUnroll>
struct Tile {
  static_assert(kUnroll == 1 || kUnroll == 2 || kUnroll == 4);
  float4 four[kUnroll];

  // NaN for chunks from `end` on.
  __device__ __forceinline__ void load(const Row& row, int32_t chunk, int32_t end) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float none = no_score();
      four[u] = make_float4(none, none, none, none);
      if (chunk + u * kThreads < end) four[u] = row.load(chunk + u * kThreads);
    }
  }

  __device__ __forceinline__ uint32_t above(float bound) const {
    uint32_t mask = 0;
    mark_four<0>(four[0], bound, mask);
    if constexpr (kUnroll > 1) mark_four<4>(four[1], bound, mask);
    if constexpr (kUnroll > 2) {
      mark_four<8>(four[2], bound, mask);
      mark_four<12>(four[3], bound, mask);
    }
    return mask;
  }
};

// Entries of a warp in a list of the block: the first one of this lane.
__device__ __forceinline__ uint32_t reserve(uint32_t* size, uint32_t count) {
  const uint32_t prefix = warp_prefix(count);
  uint32_t at = 0;
  if (lane_id() == kWarp - 1) at = atomicAdd(size, prefix);
  return __shfl_sync(kAllLanes, at, kWarp - 1) + prefix - count;
}

// Keeps the positions of scores above a bound, in any order; shared.num_kept counts all of them,
// also those for which there is no room. Chunks begin..end - 1, whose first tile is loaded.
template <int kThreads, int kUnroll, bool kAhead>
__device__ __forceinline__ void keep_above(const Row& row, int32_t begin, int32_t end,
                                           Tile<kThreads, kUnroll>& tile, float bound,
                                           Shared& shared, int32_t* kept, uint32_t capacity) {
  constexpr int kStep = kThreads * kUnroll;
  for (; begin < end; begin += kStep) {
    const int32_t chunk = begin + threadIdx.x;
    Tile<kThreads, kAhead ? kUnroll : 1> next;
    if constexpr (kAhead) next.load(row, chunk + kStep, end);
    uint32_t mask = tile.above(bound);
    uint32_t at = reserve(&shared.num_kept, __popc(mask));
    const int32_t first = row.first_of(chunk);
    for (; mask != 0; mask &= mask - 1, ++at) {
      const uint32_t i = static_cast<uint32_t>(__ffs(mask)) - 1;
      // chunks are a block's width apart; past the capacity there is one place for all
      kept[min(at, capacity - 1)] = first + static_cast<int32_t>(i / 4 * (4 * kThreads - 4) + i);
    }
    __syncwarp();
    if constexpr (kAhead) {
      tile = next;
    } else {
      tile.load(row, chunk + kStep, end);
    }
  }
}

// The same for the scores before the first chunk and behind the last, by one warp.
__device__ __forceinline__ void keep_edges(const Row& row, float bound, Shared& shared,
                                           int32_t* kept, uint32_t capacity) {
  const int32_t behind = row.first_of(row.num_chunks) + lane_id() - row.lead;
  const int32_t position = lane_id() < row.lead ? lane_id() : behind;
  uint32_t mask = 0;
  if (position < row.length) mark_above<0>(__ldg(row.scores + position), bound, mask);
  const uint32_t at = reserve(&shared.num_kept, mask);
  if (mask != 0 && at < capacity) kept[at] = position;
}

// Where candidates lie: positions of this block's own, and in rank 0 the keys of all of them. Of a
// block alone the positions are the upper half of the keys.
struct Kept {
  int32_t* positions;
  uint64_t* keys;
  uint32_t capacity;
};

// Turns the positions that the blocks kept into keys in rank 0. Returns how many there are, whether
// they fit or not.
template <int kThreads, typename Blocks>
__device__ __forceinline__ uint32_t gather_kept(const Row& row, const Kept& kept, Shared& shared) {
  constexpr int kBatch = 4;
  const bool alone = Blocks::size() == 1;
  __syncthreads();
  const uint32_t mine = shared.num_kept, fit = min(mine, kept.capacity);
  if (alone && mine > fit) return mine;
  // all blocks have begun, and cleared what others count in
  if (!alone) Blocks::wait();
  if (threadIdx.x == 0) shared.sent_to = alone ? 0 : Blocks::add(&shared.num_sent, 0, mine);
  uint32_t highest = 0;
  for (uint32_t base = 0; base < fit; base += kBatch * kThreads) {
    int32_t position[kBatch];
    float score[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t index = base + i * kThreads + threadIdx.x;
      position[i] = index < fit ? kept.positions[index] : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (position[i] >= 0) score[i] = __ldg(row.scores + position[i]);
    }
    // keys lie over positions that have been read by now
    __syncthreads();
    const uint32_t to = shared.sent_to + base + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t at = to + i * kThreads;
      if (position[i] >= 0 && at < kept.capacity) {
        const uint32_t image = image_of(score[i]);
        highest = max(highest, image);
        Blocks::store(&kept.keys[at], 0, ranked(image, position[i]));
      }
    }
  }
  highest = __reduce_max_sync(kAllLanes, highest);
  if (lane_id() == 0 && highest > 0) Blocks::max(&shared.highest, 0, highest);
  Blocks::sync();
  return alone ? mine : Blocks::load(&shared.num_sent, 0);
}

}  // namespace fd_dsa::topk
