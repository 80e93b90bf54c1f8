// Exact top-k of rows of scores, with a block or a cluster of blocks per row.
//
// A short row stays in registers. For a longer row, evenly spaced samples give a bound that
// slightly more than k scores exceed. One pass keeps these scores as candidates in shared memory.
// Counting digits finds the k-th best candidate.
//
// The number of candidates shows a bound that failed, or a plateau of equal scores at it. Passes
// over the row for each digit serve then. Counts are integers, so the order of threads does not
// affect the result.

#include "topk_row.cuh"

namespace fd_dsa::topk {

// ---- a short row, in the registers of a block

// A short row, of which each warp holds a contiguous part in registers.
template <int kThreads, int kUnroll>
struct RegisterRow {
  static constexpr int32_t kMaxChunks = kThreads * kUnroll;

  uint32_t image[4 * kUnroll];
  uint32_t present;  // a bit for each image inside the row
  int32_t first;     // position of the first image

  __device__ __forceinline__ explicit RegisterRow(const Row& row) : present(0) {
    // chunks from the one in which the row begins, so that chunks cover the whole row
    const int32_t head = row.lead == 0 ? 0 : 4 - row.lead;
    const int32_t chunk = warp_id() * kUnroll * kWarp + lane_id();
    float4 four[kUnroll];
    first = chunk * 4 - head;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) four[u] = load(row, position(4 * u));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      image[4 * u] = image_of(four[u].x);
      image[4 * u + 1] = image_of(four[u].y);
      image[4 * u + 2] = image_of(four[u].z);
      image[4 * u + 3] = image_of(four[u].w);
    }
#pragma unroll
    for (int i = 0; i < 4 * kUnroll; ++i) {
      if (static_cast<uint32_t>(position(i)) < static_cast<uint32_t>(row.length)) {
        present |= 1u << i;
      }
    }
  }

  // Loads four scores from a position on, with any value for positions outside the row.
  static __device__ __forceinline__ float4 load(const Row& row, int32_t begin) {
    if (begin >= 0 && begin + 4 <= row.length) {
      return __ldg(reinterpret_cast<const float4*>(row.scores + begin));
    }
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = begin + i >= 0 && begin + i < row.length;
      value[i] = inside ? __ldg(row.scores + begin + i) : 0.0f;
    }
    return make_float4(value[0], value[1], value[2], value[3]);
  }

  // Returns the position of an image, also outside the row.
  __device__ __forceinline__ int32_t position(int i) const {
    return first + i / 4 * (4 * kWarp) + i % 4;
  }

  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < 4 * kUnroll; ++i) {
      if ((present >> i & 1u) != 0) visit(image[i], position(i));
    }
  }
};

// Writes the positions of the scores that reach a threshold, which are k.
template <int kThreads, int kUnroll>
__device__ __forceinline__ void write_register_row(
    const Job& job, const Row& row, const RegisterRow<kThreads, kUnroll>& register_row,
    uint64_t threshold, Shared& shared) {
  uint32_t chosen = 0, before[kUnroll], sum = 0;
#pragma unroll
  for (int i = 0; i < 4 * kUnroll; ++i) {
    if (ranked(register_row.image[i], register_row.position(i)) >= threshold) chosen |= 1u << i;
  }
  chosen &= register_row.present;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t count = __popc(chosen >> (4 * u) & 15u);
    const uint32_t prefix = warp_prefix(count);
    before[u] = sum + prefix - count;
    sum += __shfl_sync(kAllLanes, prefix, kWarp - 1);
  }
  if (lane_id() == 0) shared.warp_sums[warp_id()] = sum;
  __syncthreads();
  const uint32_t start = sum_below(shared, warp_id());
  int32_t* out = job.rows.out + row.token * job.rows.k;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    uint32_t at = start + before[u];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if ((chosen >> (4 * u + j) & 1u) != 0) {
        out[at++] = entry_at(job, row, register_row.position(4 * u + j));
      }
    }
  }
}

// Chooses from a row in the registers of a block.
template <int kThreads, int kUnroll>
__device__ __forceinline__ void choose_from_registers(const Job& job, const Row& row,
                                                      Shared& shared) {
  const RegisterRow<kThreads, kUnroll> register_row(row);
  uint32_t low = 0xffffffffu, high = 0;
  register_row.each([&](uint32_t image, int32_t) {
    low = min(low, image);
    high = max(high, image);
  });
  block_range<kThreads>(shared, low, high);
  const auto each = [&](auto visit) { register_row.each(visit); };
  const uint32_t k = static_cast<uint32_t>(job.rows.k);
  const uint64_t threshold = find_threshold<kThreads>(shared, each, k, low, high, row.length);
  write_register_row(job, row, register_row, threshold, shared);
}

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
      // Chunks are a block's width apart. Positions past the capacity share the last entry.
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

// ---- passes over the row, digit by digit of the threshold
//
// They serve plateaus of equal scores and candidates that do not fit.

// The positions of a row that a block or one of its warps reads.
struct Span {
  int32_t begin, end;

  template <int kThreads>
  __device__ __forceinline__ Span of_warp() const {
    constexpr int kWarps = kThreads / kWarp;
    const int32_t length = max(0, end - begin);
    const int32_t each = (length + kWarps * kWarp - 1) / (kWarps * kWarp) * kWarp;
    const int32_t first = min(begin + warp_id() * each, end);
    return {first, min(first + each, end)};
  }
};

// Scores above and equal to a threshold before a warp, over all blocks of the cluster.
struct PrecedingCounts {
  uint32_t better, equal, all_better, all_equal;
};

// Adds one to a bin for each active lane. Lanes with the same bin as the first share one addition.
__device__ __forceinline__ void count_bin(uint32_t* bins, uint32_t bin, bool mine) {
  const unsigned active = __ballot_sync(kAllLanes, mine);
  if (active == 0) return;
  const int leader = __ffs(active) - 1;
  const uint32_t first = __shfl_sync(kAllLanes, bin, leader);
  const unsigned same = __ballot_sync(kAllLanes, mine && bin == first);
  if (lane_id() == leader) atomicAdd(&bins[first], static_cast<uint32_t>(__popc(same)));
  if (mine && bin != first) atomicAdd(&bins[bin], 1u);
}

// Sums the bins of all blocks into those of every block. `sums` is shared memory of rank 0.
template <int kThreads, typename Blocks>
__device__ void share_bins(Shared& shared, uint32_t* sums) {
  Blocks::sync();
  if (Blocks::rank() == 0) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) sums[i] = 0;
  }
  Blocks::sync();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    const uint32_t count = shared.bins[i];
    if (count != 0) Blocks::add(&sums[i], 0, count);
  }
  Blocks::sync();
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = Blocks::load(&sums[i], 0);
  __syncthreads();
}

// Returns the image of the k-th best score of a row with more than k scores.
//
// `need` becomes the number of chosen scores that equal it.
template <int kThreads, typename Blocks>
__device__ uint32_t find_image(const Row& row, Span span, uint32_t& need, Shared& shared,
                               uint32_t* sums) {
  uint32_t prefix = 0;
  const Span mine = span.of_warp<kThreads>();
  for (int decided = 0; decided < 32;) {
    const int width = min(kBinBits, 32 - decided), shift = 32 - decided - width;
    __syncthreads();
    for (int32_t at = mine.begin; at < mine.end; at += kWarp) {
      const int32_t position = at + lane_id();
      const bool inside = position < mine.end;
      const uint32_t image = inside ? image_of(__ldg(row.scores + position)) : 0;
      const bool counts = inside && (decided == 0 || image >> (32 - decided) == prefix);
      count_bin(shared.bins, image >> shift & ((1u << width) - 1), counts);
    }
    __syncthreads();
    share_bins<kThreads, Blocks>(shared, sums);
    find_bin<kThreads>(shared, need);
    need -= shared.above;
    prefix = prefix << width | shared.bin;
    decided += width;
  }
  return prefix;
}

// Counts a row's scores above and equal to a threshold.
template <int kThreads, typename Blocks>
__device__ PrecedingCounts count_scores(const Row& row, Span span, uint32_t threshold,
                                        Shared& shared) {
  uint32_t better = 0, equal = 0;
  const Span mine = span.of_warp<kThreads>();
  for (int32_t at = mine.begin; at < mine.end; at += kWarp) {
    const int32_t position = at + lane_id();
    const bool inside = position < mine.end;
    const uint32_t image = inside ? image_of(__ldg(row.scores + position)) : 0;
    better += inside && image > threshold;
    equal += inside && image == threshold;
  }
  better = __reduce_add_sync(kAllLanes, better);
  equal = __reduce_add_sync(kAllLanes, equal);
  if (lane_id() == 0) {
    shared.warp_low[warp_id()] = better;
    shared.warp_high[warp_id()] = equal;
  }
  __syncthreads();
  const bool lower = lane_id() < warp_id();
  const uint32_t better_below =
      __reduce_add_sync(kAllLanes, lower ? shared.warp_low[lane_id()] : 0);
  const uint32_t equal_below =
      __reduce_add_sync(kAllLanes, lower ? shared.warp_high[lane_id()] : 0);
  if (threadIdx.x == kThreads - kWarp) {
    for (uint32_t rank = 0; rank < Blocks::size(); ++rank) {
      Blocks::store(&shared.better_counts[Blocks::rank()], rank, better_below + better);
      Blocks::store(&shared.equal_counts[Blocks::rank()], rank, equal_below + equal);
    }
  }
  Blocks::sync();
  PrecedingCounts before = {better_below, equal_below, 0, 0};
  for (uint32_t rank = 0; rank < Blocks::size(); ++rank) {
    const uint32_t more = shared.better_counts[rank], same = shared.equal_counts[rank];
    if (rank < Blocks::rank()) {
      before.better += more;
      before.equal += same;
    }
    before.all_better += more;
    before.all_equal += same;
  }
  // the next count may overwrite
  Blocks::sync();
  return before;
}

// Writes the positions of the scores above a threshold and of the first `ties` scores equal to it.
template <int kThreads>
__device__ void write_scores(const Job& job, const Row& row, Span span, uint32_t threshold,
                             uint32_t ties, PrecedingCounts before) {
  const Span mine = span.of_warp<kThreads>();
  uint32_t at_entry = before.better + min(before.equal, ties);
  uint32_t equal_below = before.equal;
  int32_t* out = job.rows.out + row.token * job.rows.k;
  const uint32_t k = static_cast<uint32_t>(job.rows.k);
  for (int32_t at = mine.begin; at < mine.end && at_entry < k; at += kWarp) {
    const int32_t position = at + lane_id();
    const bool inside = position < mine.end;
    const uint32_t image = inside ? image_of(__ldg(row.scores + position)) : 0;
    const bool equal = inside && image == threshold;
    const unsigned equals = __ballot_sync(kAllLanes, equal);
    const uint32_t rank = equal_below + __popc(equals & lanes_below());
    const bool chosen = (inside && image > threshold) || (equal && rank < ties);
    const unsigned all = __ballot_sync(kAllLanes, chosen);
    if (chosen) out[at_entry + __popc(all & lanes_below())] = entry_at(job, row, position);
    at_entry += __popc(all);
    equal_below += __popc(equals);
  }
}

// Chooses by passes over a row with more than k scores. `hint` may be the k-th best score.
template <int kThreads, typename Blocks>
__device__ __noinline__ void choose_by_scans(const Job& job, Row row, Span span,
                                             bool has_hint, uint32_t hint, Shared& shared,
                                             uint32_t* sums) {
  uint32_t k = static_cast<uint32_t>(job.rows.k);
  if (has_hint) {
    const PrecedingCounts before = count_scores<kThreads, Blocks>(row, span, hint, shared);
    if (before.all_better < k && k <= before.all_better + before.all_equal) {
      write_scores<kThreads>(job, row, span, hint, k - before.all_better, before);
      return;
    }
  }
  const uint32_t threshold = find_image<kThreads, Blocks>(row, span, k, shared, sums);
  const PrecedingCounts before = count_scores<kThreads, Blocks>(row, span, threshold, shared);
  write_scores<kThreads>(job, row, span, threshold, k, before);
}

// ---- kernels

// The parts of shared memory whose sizes the host chooses.
struct Lists {
  Shared& shared;
  CandidateBuffers kept;
  Order order;

  __device__ __forceinline__ Lists(const Sizes& sizes, bool alone)
      : shared(*reinterpret_cast<Shared*>(shared_memory())) {
    kept.capacity = static_cast<uint32_t>(sizes.capacity);
    kept.keys = reinterpret_cast<uint64_t*>(shared_memory() + sizeof(Shared));
    kept.positions = reinterpret_cast<int32_t*>(kept.keys) + (alone ? 1 : 2) * sizes.capacity;
    order.bits = reinterpret_cast<uint32_t*>(kept.positions + sizes.capacity);
    order.before = order.bits + sizes.num_bits / 32;
    order.num_bits = sizes.num_bits;
    order.chosen = reinterpret_cast<int32_t*>(order.before + sizes.num_bits / 64);
  }

  // Clears the counters.
  template <int kThreads>
  __device__ __forceinline__ void clear() const {
    fill<kThreads>(shared.bins, (kBins + kSampleBins) / 4, 0);
    fill<kThreads>(shared.sample_low, kSampleBins / 4, 0xffffffffu);
    fill<kThreads>(order.bits, order.num_bits / 128, 0);
    if (threadIdx.x == 0) {
      shared.num_small = shared.num_kept = shared.num_sent = shared.highest = 0;
    }
  }

  template <int kThreads>
  static __device__ __forceinline__ void fill(uint32_t* words, int32_t num_fours, uint32_t value) {
    uint4* fours = reinterpret_cast<uint4*>(words);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < num_fours; i += kThreads) {
      fours[i] = make_uint4(value, value, value, value);
    }
  }
};

// Writes all positions of a row with at most k of them.
template <int kThreads, typename Blocks>
__device__ __forceinline__ void write_all(const Job& job, const Row& row) {
  int32_t* out = job.rows.out + row.token * job.rows.k;
#pragma unroll 1
  for (int64_t i = Blocks::rank() * kThreads + threadIdx.x; i < job.rows.k;
       i += Blocks::size() * kThreads) {
    out[i] = i < row.length ? entry_at(job, row, static_cast<int32_t>(i)) : -1;
  }
}

// Chooses from a long row, whose candidates are the scores above a bound.
template <int kThreads, int kUnroll, bool kAhead, typename Blocks>
__device__ __forceinline__ void choose_by_bound(const Job& job, const Row& row,
                                                const Lists& lists) {
  constexpr int kLoads = kThreads >= kMaxSamples / 4 ? 1 : kMaxSamples / 4 / kThreads;
  const int32_t num_blocks = Blocks::size(), rank = Blocks::rank();
  const int32_t share = (row.num_chunks + num_blocks - 1) / num_blocks;
  const int32_t each = (share + kWarp - 1) / kWarp * kWarp;
  const int32_t begin = min(rank * each, row.num_chunks);
  const int32_t end = min(begin + each, row.num_chunks);
  const uint32_t k = static_cast<uint32_t>(job.rows.k);
  const CandidateBuffers& kept = lists.kept;
  Shared& shared = lists.shared;
  Tile<kThreads, kUnroll> tile;
  tile.load(row, begin + threadIdx.x, end);
  const uint32_t bound = choose_bound<kThreads, kLoads>(row, job.rows.k, shared);
  if (rank == 0 && warp_id() == 0) {
    keep_edges(row, score_of(bound), shared, kept.positions, kept.capacity);
  }
  keep_candidates<kThreads, kUnroll, kAhead>(row, begin, end, tile, score_of(bound), shared,
                                             kept.positions, kept.capacity);
  const uint32_t all = gather_candidates<kThreads, Blocks>(row, kept, shared);
  if (all < k || all > kept.capacity) {
    const Span span = {rank == 0 ? 0 : row.first_of(begin),
                       rank == num_blocks - 1 ? row.length : row.first_of(end)};
    choose_by_scans<kThreads, Blocks>(job, row, span, all < k, bound, shared,
                                      reinterpret_cast<uint32_t*>(kept.keys));
    return;
  }
  if (rank > 0) {
    Blocks::arrive();
    return;
  }
  const List list = {kept.keys, all};
  uint64_t threshold = 0;
  if (all > k) {
    const auto each_listed = [&](auto visit) { list.each<kThreads>(visit); };
    threshold = find_threshold<kThreads>(shared, each_listed, k, bound + 1, shared.highest,
                                         row.length);
  }
  write_list<kThreads>(job, row, list, lists.order, threshold, shared);
  // other blocks may still read the count
  if (num_blocks > 1) Blocks::sync();
}

// Returns whether a row has more than k positions, and writes a shorter row completely.
template <int kThreads, typename Blocks>
__device__ __forceinline__ bool needs_choice(const Job& job, const Row& row) {
  if (row.length > job.rows.k) return true;
  write_all<kThreads, Blocks>(job, row);
  return false;
}

// Chooses from rows that fit into the registers of a block.
template <int kThreads, int kMinBlocks, int kUnroll>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    held_kernel(const __grid_constant__ Job job) {
  using Blocks = Cluster<false>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const Row row(job.rows, static_cast<int32_t>(blockIdx.x));
  Lists::fill<kThreads>(shared.bins, kBins / 4, 0);
  if (threadIdx.x == 0) shared.num_small = 0;
  if (!needs_choice<kThreads, Blocks>(job, row)) return;
  choose_from_registers<kThreads, kUnroll>(job, row, shared);
}

// Chooses from rows of any length.
template <int kThreads, int kMinBlocks, int kUnroll, bool kAhead, bool kCluster>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    bound_kernel(const __grid_constant__ Job job) {
  using Blocks = Cluster<kCluster>;
  const Lists lists(job.sizes, !kCluster);
  const Row row(job.rows, static_cast<int32_t>(blockIdx.x / Blocks::size()));
  lists.clear<kThreads>();
  if (!needs_choice<kThreads, Blocks>(job, row)) return;
  Blocks::arrive();
  choose_by_bound<kThreads, kUnroll, kAhead, Blocks>(job, row, lists);
}

// ---- launches

inline Job job_of(const Rows& rows, const Sizes& sizes) {
  Job job = {rows, sizes, -1};
  for (int shift = 0; shift < 31; ++shift) {
    if (rows.block_size == 1 << shift) job.block_shift = shift;
  }
  return job;
}

template <int kThreads, int kMinBlocks, int kUnroll>
int launch_register_rows(const Rows& rows, void* stream) {
  const unsigned blocks = static_cast<unsigned>(rows.num_rows);
  return launch(launch_config(blocks, kThreads, stream, sizeof(Shared)),
                held_kernel<kThreads, kMinBlocks, kUnroll>, job_of(rows, {}));
}

// Static, so that two libraries in one process have their own flags.
template <int kThreads, int kMinBlocks, int kUnroll, bool kAhead, bool kCluster>
static int launch_bound(const Rows& rows, const Sizes& sizes, const Gpu& gpu, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  auto* kernel = bound_kernel<kThreads, kMinBlocks, kUnroll, kAhead, kCluster>;
  const cudaError_t error = prepare(kernel, gpu.device, gpu.shared_bytes, kCluster, prepared);
  if (error != cudaSuccess) return static_cast<int>(error);
  const unsigned blocks = static_cast<unsigned>(rows.num_rows) * sizes.cluster;
  const unsigned bytes = static_cast<unsigned>(sizeof(Shared)) + sizes.list_bytes();
  cudaLaunchConfig_t config = launch_config(blocks, kThreads, stream, bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(sizes.cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = kCluster ? 1 : 0;
  return launch(config, kernel, job_of(rows, sizes));
}

inline int launch_topk(const Rows& rows, void* stream) {
  if (rows.num_rows <= 0 || rows.k <= 0) return 0;
  // rows that begin between two chunks take one chunk more
  const bool aligned =
      reinterpret_cast<uintptr_t>(rows.logits) % 16 == 0 && rows.row_stride % 4 == 0;
  const int64_t chunks = (static_cast<int64_t>(rows.width) + 3) / 4 + (aligned ? 0 : 1);
  if (rows.width <= rows.k || chunks <= RegisterRow<512, 2>::kMaxChunks) {
    return launch_register_rows<512, 3, 2>(rows, stream);
  }
  Gpu gpu = {};
  const cudaError_t error = find_gpu(gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  // with several rows per multiprocessor, blocks of half the size are faster, as measured on an
  // H200
  const bool many = rows.num_rows > gpu.num_sms;
  if (chunks <= RegisterRow<1024, 2>::kMaxChunks) {
    return many ? launch_register_rows<512, 3, 4>(rows, stream)
                : launch_register_rows<1024, 1, 2>(rows, stream);
  }
  const Sizes sizes = choose_sizes(rows, gpu, sizeof(Shared));
  if (sizes.cluster > 1) return launch_bound<1024, 1, 2, true, true>(rows, sizes, gpu, stream);
  if (many) return launch_bound<512, 2, 4, false, false>(rows, sizes, gpu, stream);
  return launch_bound<1024, 1, 4, false, false>(rows, sizes, gpu, stream);
}

}  // namespace fd_dsa::topk

extern "C" int fd_dsa_topk_cuda(const FdDsaTopk* rows, void* stream) {
  return fd_dsa::topk::launch_topk(*rows, stream);
}

extern "C" int fd_dsa_topk_bytes() { return static_cast<int>(sizeof(FdDsaTopk)); }
