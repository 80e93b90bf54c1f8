// Top-k by a bound: the candidates above it, and the best of them.
#pragma once

#include "topk_row.cuh"

namespace fd_dsa::topk {

// ---- a bound that slightly more than k scores exceed, and its candidates

// Maps a number, which may be -0.0, to an integer of the same order.
__device__ __forceinline__ uint32_t image_of_number(float score) {
  const uint32_t bits = __float_as_uint(score);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// `samples_above` with the fast instructions of the hardware.
__device__ __forceinline__ float wanted_samples(float size, float length, float k) {
  const float scale = __fdividef(1.0f, length), share = k * scale;
  const float seen = fminf(size * scale, 1.0f);
  const float variance = fmaxf(size * share * (1.0f - share) * (1.0f - seen), 1e-6f);
  return size * share + 6.0f * variance * __frsqrt_rn(variance) + 4.0f;
}

// Sets the bound to the lowest sample of the bin with the `wanted`-th sample from the top.
//
// With fewer samples, the bound is `low`. One warp calls it.
__device__ __forceinline__ void find_sample(Shared& shared, uint32_t wanted, uint32_t low) {
  constexpr int kBinsPerLane = kSampleBins / kWarp;
  const int first = kSampleBins - (lane_id() + 1) * kBinsPerLane;
  uint32_t count[kBinsPerLane], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerLane; ++i) {
    count[i] = shared.sample_bins[first + i];
    sum += count[i];
  }
  const uint32_t below = warp_prefix(sum);
  uint32_t above = below - sum;
  const bool mine = above < wanted && wanted <= below;
  if (__ballot_sync(kAllLanes, mine) == 0) {
    if (lane_id() == 0) shared.bound = image_of(score_of(low));
  } else if (mine) {
    int bin = kBinsPerLane - 1;
#pragma unroll
    for (int i = kBinsPerLane - 1; i > 0; --i) {
      above += count[i];
      if (above < wanted) bin = i - 1;
    }
    // zeros of both signs are one score
    shared.bound = image_of(score_of(shared.sample_low[first + bin]));
  }
}

// Returns the image of a score that slightly more than k of the row's scores exceed.
//
// The bound comes from evenly spaced samples. The best samples of groups, except the lowest of
// them, bound the bins from below. The bins are therefore narrow around the wanted sample, and few
// samples are counted. The samples of a group come from all parts of the row, so scores that rise
// or fall with the position leave no group without high scores. The bound is a sample, not an edge
// of a bin, so it equals the score of a plateau exactly.
template <int kThreads, int kLoads>
__device__ __forceinline__ uint32_t choose_bound(const Row& row, int32_t k, Shared& shared) {
  constexpr uint32_t kMaxChunks = kThreads * kLoads;
  const uint32_t all = static_cast<uint32_t>(row.num_chunks);
  const uint32_t step = all > kMaxChunks ? all / kMaxChunks : 1,
                 rest = all > kMaxChunks ? all % kMaxChunks : 0;
  // neighbouring lanes sample distant chunks; if the samples cover the row, lanes read side by side
  const uint32_t spread = (__brev(lane_id()) >> 27) * (kThreads / kWarp) + warp_id();
  const uint32_t first = step > 1 ? spread : threadIdx.x;
  float4 four[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const uint32_t index = i * kThreads + first;
    const float nan = no_score();
    four[i] = make_float4(nan, nan, nan, nan);
    if (index < all) {
      four[i] = row.load(static_cast<int32_t>(index * step + index * rest / kMaxChunks));
    }
  }
  const float size = static_cast<float>(4 * min(all, kMaxChunks));
  const float wanted = wanted_samples(size, row.length, k);
  // Groups are small enough that the lowest of their best samples is below the wanted sample.
  // Without such a size, samples are not grouped.
  const float group = __fdividef(2.5f * size, wanted);
  // the lowest image less one, so that NaN, whose image is 0, does not count
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
  // one low group would stretch the range across zero, where the images of numbers are most dense
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

// Scores of chunks that are a block's width apart.
template <int kThreads, int kUnroll>
struct Tile {
  static_assert(kUnroll == 1 || kUnroll == 2 || kUnroll == 4);
  float4 four[kUnroll];

  // Loads the chunks below `end`, and NaN for the others.
  __device__ __forceinline__ void load(const Row& row, int32_t chunk, int32_t end) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float nan = no_score();
      four[u] = make_float4(nan, nan, nan, nan);
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

// Reserves entries of a list of the block for a warp, and returns the first entry of this lane.
__device__ __forceinline__ uint32_t reserve(uint32_t* size, uint32_t count) {
  const uint32_t prefix = warp_prefix(count);
  uint32_t at = 0;
  if (lane_id() == kWarp - 1) at = atomicAdd(size, prefix);
  return __shfl_sync(kAllLanes, at, kWarp - 1) + prefix - count;
}

// Keeps the positions of scores above a bound, in any order.
//
// shared.num_kept counts all of them, also those past the capacity. The chunks are begin..end - 1,
// and their first tile is loaded already.
template <int kThreads, int kUnroll, bool kAhead>
__device__ __forceinline__ void keep_candidates(const Row& row, int32_t begin, int32_t end,
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
      // chunks are a block's width apart
      const int32_t position = first + static_cast<int32_t>(i / 4 * (4 * kThreads - 4) + i);
      if (at < capacity) kept[at] = position;
    }
    __syncwarp();
    if constexpr (kAhead) {
      tile = next;
    } else {
      tile.load(row, chunk + kStep, end);
    }
  }
}

// Keeps scores before the first chunk and after the last one. One warp calls it.
__device__ __forceinline__ void keep_edges(const Row& row, float bound, Shared& shared,
                                           int32_t* kept, uint32_t capacity) {
  const int32_t after = row.first_of(row.num_chunks) + lane_id() - row.lead;
  const int32_t position = lane_id() < row.lead ? lane_id() : after;
  uint32_t mask = 0;
  if (position < row.length) mark_above<0>(__ldg(row.scores + position), bound, mask);
  const uint32_t at = reserve(&shared.num_kept, mask);
  if (mask != 0 && at < capacity) kept[at] = position;
}

// The memory of candidates: positions of this block, and in rank 0 the keys of all blocks.
//
// A row of one block has its positions in the upper half of the keys.
struct CandidateBuffers {
  int32_t* positions;
  uint64_t* keys;
  uint32_t capacity;
};

// Turns the positions that the blocks kept into keys in rank 0.
//
// Returns the count of positions, also if they do not fit.
template <int kThreads, typename Blocks>
__device__ __forceinline__ uint32_t gather_candidates(const Row& row, const CandidateBuffers& kept,
                                                      Shared& shared) {
  constexpr int kBatch = 4;
  const bool alone = Blocks::size() == 1;
  __syncthreads();
  const uint32_t mine = shared.num_kept, fit = min(mine, kept.capacity);
  if (alone && mine > fit) return mine;
  // all blocks have started and have cleared their counters
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
    // keys overwrite positions, which have all been read at this point
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

// ---- the best candidates in shared memory

// Candidates in shared memory, in any order.
struct List {
  const uint64_t* keys;
  uint32_t size;

  template <int kThreads, typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint64_t key = keys[i];
      visit(static_cast<uint32_t>(key >> 32), position_of(key));
    }
  }
};

// The memory that sorts positions.
struct Order {
  uint32_t* bits;    // one bit per position of a window
  uint32_t* before;  // set bits before each 64
  int32_t num_bits;
  int32_t* chosen;   // k positions
};

// Counts the set bits before each 64 of a window, and returns the total.
template <int kThreads>
__device__ __forceinline__ uint32_t count_bits(Shared& shared, const Order& order,
                                               int32_t length) {
  const uint2* words = reinterpret_cast<const uint2*>(order.bits);
  const int32_t num_words = (length + 63) / 64;
  const int32_t each = (num_words + kThreads - 1) / kThreads;
  const int32_t first = min(static_cast<int32_t>(threadIdx.x) * each, num_words);
  const int32_t last = min(first + each, num_words);
  uint32_t count = 0;
#pragma unroll 1
  for (int32_t i = first; i < last; ++i) count += __popc(words[i].x) + __popc(words[i].y);
  const uint32_t prefix = warp_prefix(count);
  if (lane_id() == kWarp - 1) shared.warp_sums[warp_id()] = prefix;
  __syncthreads();
  uint32_t sum = sum_below(shared, warp_id()) + prefix - count;
#pragma unroll 1
  for (int32_t i = first; i < last; ++i) {
    order.before[i] = sum;
    sum += __popc(words[i].x) + __popc(words[i].y);
  }
  const uint32_t all = sum_below(shared, kThreads / kWarp);
  __syncthreads();
  return all;
}

// Writes the positions of the listed candidates that reach a threshold, which are k.
template <int kThreads>
__device__ __forceinline__ void write_list(const Job& job, const Row& row, const List& list,
                                           const Order& order, uint64_t threshold,
                                           Shared& shared) {
  uint32_t done = 0;
  for (int32_t base = 0; base < row.length; base += order.num_bits) {
    const uint32_t length = static_cast<uint32_t>(min(order.num_bits, row.length - base));
    const auto each_chosen = [&](auto visit) {
      list.each<kThreads>([&](uint32_t image, int32_t position) {
        const uint32_t bit = static_cast<uint32_t>(position - base);
        if (ranked(image, position) >= threshold && bit < length) visit(bit, position);
      });
    };
    if (base > 0) {
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < order.num_bits / kWarp; i += kThreads) order.bits[i] = 0;
      __syncthreads();
    }
    each_chosen(
        [&](uint32_t bit, int32_t) { atomicOr(&order.bits[bit / kWarp], 1u << bit % kWarp); });
    __syncthreads();
    const uint32_t count = count_bits<kThreads>(shared, order, static_cast<int32_t>(length));
    each_chosen([&](uint32_t bit, int32_t position) {
      const uint2 word = reinterpret_cast<const uint2*>(order.bits)[bit / 64];
      const uint32_t mask = (1u << bit % kWarp) - 1;
      const bool upper = bit % 64 >= kWarp;
      const uint32_t below = upper ? __popc(word.x) + __popc(word.y & mask) : __popc(word.x & mask);
      const uint32_t at = done + order.before[bit / 64] + below;
      // scores that change during the launch may be chosen wrongly, but never write outside the row
      if (at < static_cast<uint32_t>(job.rows.k)) order.chosen[at] = position;
    });
    done += count;
    __syncthreads();
  }
  int32_t* out = job.rows.out + row.token * job.rows.k;
#pragma unroll 2
  for (int32_t i = threadIdx.x; i < job.rows.k; i += kThreads) {
    out[i] = entry_at(job, row, order.chosen[i]);
  }
}

}  // namespace fd_dsa::topk
