// Top-k over one row: reading the row, choosing the sizes, and finding the k-th best candidate.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "topk.h"
#include "ptx.cuh"

namespace fd_dsa::topk {

// ---- sizes, which affect the time but not the result

constexpr int kMaxCluster = 16;
constexpr int kMaxSamples = 4096;
// lowest capacity for candidates, whose memory serves other purposes too
constexpr int32_t kMinCapacity = 1024;

struct Sizes {
  int32_t cluster;     // blocks of a row
  int32_t capacity;    // candidates that fit
  int32_t num_bits;    // positions sorted at once; a multiple of 128
  int32_t num_chosen;  // k, or 0 if k candidates never fit

  // Returns the bytes of shared memory after `Shared`.
  int32_t list_bytes() const {
    const int32_t order = num_bits / 8 + num_bits / 16 + (num_chosen + 3) / 4 * 16;
    return (cluster > 1 ? 12 : 8) * capacity + order;
  }
};

// Returns how many of `size` samples a bound should exceed, so that it is below k of `length`
// scores.
//
// The result is 6 standard deviations above the expectation. A bound that fails costs time but
// keeps the result exact.
FD_DSA_BOTH float samples_above(float size, float length, float k) {
  const float share = k / length, seen = size < length ? size / length : 1.0f;
  const float variance = size * share * (1.0f - share) * (1.0f - seen);
  return size * share + 6.0f * sqrtf(variance > 0.0f ? variance : 0.0f) + 4.0f;
}

inline int32_t rounded_up(int64_t value, int32_t step) {
  return static_cast<int32_t>((value + step - 1) / step * step);
}

// Chooses sizes for rows with more than k positions, beside `fixed_bytes` of shared memory.
inline Sizes choose_sizes(const Rows& rows, const Gpu& gpu, int32_t fixed_bytes) {
  constexpr int32_t kShare = 4096, kMaxBits = 1 << 19;
  Sizes sizes = {1, kMinCapacity, 0, 0};
  const int32_t width = rows.width;
  while (gpu.major >= 9 && sizes.cluster < kMaxCluster) {
    const int32_t more = 2 * sizes.cluster;
    // larger clusters would not all run at once, as measured on an H200 with 8 to 32 rows
    const int64_t max_blocks = more > 2 ? gpu.num_sms / 2 : gpu.num_sms;
    if (static_cast<int64_t>(rows.num_rows) * more > max_blocks || width / more < kShare) break;
    sizes.cluster = more;
  }
  sizes.capacity = 0;
  sizes.num_bits = rounded_up(std::min(width, kMaxBits), 1024);
  const int32_t room = gpu.shared_bytes - fixed_bytes - sizes.list_bytes() - 16;
  const float wanted = samples_above(kMaxSamples, width, rows.k);
  const float kept = wanted / std::min(width, kMaxSamples) * width;
  sizes.capacity = std::max(rounded_up(std::min(1.6f * kept, 1e8f), 256), kMinCapacity);
  const int32_t bytes = sizes.cluster > 1 ? 12 : 8;
  if (static_cast<int64_t>(bytes) * sizes.capacity + 4LL * rows.k > room) {
    const int32_t chosen = 4 * std::min(rows.k, room / 4);
    sizes.capacity = std::max((room - chosen) / bytes / 256 * 256, kMinCapacity);
  }
  if (rows.k <= sizes.capacity) sizes.num_chosen = rows.k;
  return sizes;
}

// ---- state shared by the threads of a block

constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr int kSampleBinBits = 8;
constexpr int kSampleBins = 1 << kSampleBinBits;
// candidates that are few enough to compare each with all others
constexpr int kSmall = 64;
// a few warps sum up bins with fewer instructions than all warps
constexpr int kScanWarps = 8;

// The shared memory of a block. `Lists` places the lists of variable size after it.
struct alignas(16) Shared {
  uint32_t bins[kBins];
  uint32_t sample_bins[kSampleBins], sample_low[kSampleBins];
  uint64_t small[kSmall];
  uint64_t threshold;
  uint32_t warp_sums[kWarp], warp_low[kWarp], warp_high[kWarp];
  // result of find_bin: the bin, entries above it, entries in it
  uint32_t bin, above, inside;
  uint32_t num_small, bound;
  // kept candidates of this block, the index of its first among all candidates, and, in rank 0,
  // count and highest of all candidates
  uint32_t num_kept, sent_to, num_sent, highest;
  // of each block of the cluster
  uint32_t better_counts[kMaxCluster], equal_counts[kMaxCluster];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1; }

// Returns the sum of the first `warp` sums of warps; all lanes call it.
__device__ __forceinline__ uint32_t sum_below(const Shared& shared, int warp) {
  return __reduce_add_sync(kAllLanes, lane_id() < warp ? shared.warp_sums[lane_id()] : 0);
}

// Reduces the values of all threads to the smallest and the largest, in all threads.
//
// The `kSkipped` lowest of the warps' smallest values are left out.
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
    // one of several equal values
    if ((__ballot_sync(kAllLanes, least) & lanes_below()) == 0 && least) low = 0xffffffffu;
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, valid ? shared.warp_high[lane_id()] : 0u);
}

// Finds the bin of the `need`-th entry from the top, and empties the bins.
//
// The bins hold at least `need` entries. A barrier is needed before the call, and the call ends
// with one.
template <int kThreads>
__device__ __forceinline__ void find_bin(Shared& shared, uint32_t need) {
  constexpr int kWarps = kThreads / kWarp < kScanWarps ? kThreads / kWarp : kScanWarps;
  constexpr int kBinsPerThread = kBins / (kWarps * kWarp);
  const bool scans = warp_id() < kWarps;
  const int first = kBins - (static_cast<int>(threadIdx.x) + 1) * kBinsPerThread;
  uint32_t count[kBinsPerThread], sum = 0, prefix = 0;
  if (scans) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
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
      for (int i = kBinsPerThread - 1; i >= 0; --i) {
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

// ---- a row

// The host's arguments of a kernel.
struct Job {
  Rows rows;
  Sizes sizes;
  int32_t block_shift;  // for a block size that is a power of two, else -1
};

__device__ __forceinline__ float no_score() { return __uint_as_float(0x7fffffffu); }

__device__ __forceinline__ uint32_t image_of(float score) {
  return image_of_bits(__float_as_uint(score));
}

// Returns the score of an image, or NaN for 0.
__device__ __forceinline__ float score_of(uint32_t image) {
  return __uint_as_float((image >> 31) != 0 ? image ^ 0x80000000u : ~image);
}

// The row of a block.
//
// Chunks are 16 bytes at 16-byte addresses inside the row. Up to three scores come before the first
// chunk, and up to three after the last.
struct Row {
  const float* scores;  // from the row's first position on
  int64_t token;
  int32_t first, length, lead, num_chunks;

  __device__ __forceinline__ Row(const Rows& rows, int32_t row)
      : scores(rows.logits + row * rows.row_stride),
        token(rows.first_token + int64_t{row}),
        first(0) {
    if (rows.lengths != nullptr) {
      length = bounded(rows.lengths[token], rows.width);
    } else {
      // all loads come before the first branch
      const int32_t batch_id = rows.batch_ids[token];
      const int32_t last = static_cast<int32_t>(rows.position_ids[token]);
      const Window window = window_at(rows, token, batch_id, last);
      first = window.first;
      length = window.length;
      scores += first;
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

// Returns `entry_of` the score at an index of a row, by shifts instead of divisions where possible.
__device__ __forceinline__ int32_t entry_at(const Job& job, const Row& row, int32_t index) {
  const Rows& rows = job.rows;
  const int32_t position = row.first + index;
  if (rows.lengths != nullptr || job.block_shift < 0) return entry_of(rows, row.token, position);
  const int32_t column = position >> job.block_shift;
  if (column >= rows.table_width) return -1;
  const int64_t request = rows.batch_ids[row.token];
  const int32_t block = __ldg(rows.block_tables + request * rows.table_width + column);
  if (block < 0 || block >= rows.num_blocks) return -1;
  return (block << job.block_shift) + (position & ((1 << job.block_shift) - 1));
}

// ---- the k-th best

// Narrows low..high to the leading digit of the `need`-th value from the top.
//
// The digit is the leading one below the bits that low and high share. `each(visit)` calls
// visit(value) for the thread's own values.
template <int kThreads, typename Each>
__device__ __forceinline__ void narrow(Shared& shared, Each each, uint32_t& need, uint32_t& low,
                                       uint32_t& high) {
  const uint32_t start = low, range = high - low;
  const int shift = max(0, 32 - __clz(range) - kBinBits);
  each([&](uint32_t value) {
    if (value - start <= range) atomicAdd(&shared.bins[(value - start) >> shift], 1u);
  });
  __syncthreads();
  find_bin<kThreads>(shared, need);
  need -= shared.above;
  low += shared.bin << shift;
  // the bin may reach past the largest number
  high = low + min(high - low, (1u << shift) - 1);
}

// Returns the `need`-th largest of at most kSmall candidates in first..last.
template <typename Each>
__device__ __forceinline__ uint64_t rank_small(Shared& shared, Each each, uint32_t need,
                                               uint64_t first, uint64_t last) {
  each([&](uint32_t image, int32_t position) {
    const uint64_t key = ranked(image, position);
    if (key < first || key > last) return;
    const uint32_t at = atomicAdd(&shared.num_small, 1u);
    if (at < kSmall) shared.small[at] = key;
  });
  __syncthreads();
  if (threadIdx.x < shared.inside) {
    const uint64_t key = shared.small[threadIdx.x];
    uint32_t better = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < shared.inside; ++i) better += shared.small[i] > key;
    if (better == need - 1) shared.threshold = key;
  }
  __syncthreads();
  return shared.threshold;
}

// Returns the k-th best candidate of all threads, or a key between it and the next one.
//
// The chosen candidates are those with at least this key. `each(visit)` calls visit(image,
// position) for the thread's own candidates. All threads together have at least `need` of them,
// with images in low..high and positions below `length`.
template <int kThreads, typename Each>
__device__ uint64_t find_threshold(Shared& shared, Each each, uint32_t need, uint32_t low,
                                   uint32_t high, int32_t length) {
  do {
    narrow<kThreads>(
        shared, [&](auto visit) { each([&](uint32_t image, int32_t) { visit(image); }); }, need,
        low, high);
    if (shared.inside == need) return static_cast<uint64_t>(low) << 32;
  } while (shared.inside > kSmall && low < high);
  // complements of positions, because the lowest position ranks first among equal scores
  uint32_t first = ~static_cast<uint32_t>(length - 1), last = 0xffffffffu;
  while (shared.inside > kSmall) {
    const auto each_equal = [&](auto visit) {
      each([&](uint32_t image, int32_t position) {
        if (image == low) visit(~static_cast<uint32_t>(position));
      });
    };
    narrow<kThreads>(shared, each_equal, need, first, last);
    if (shared.inside == need) return static_cast<uint64_t>(low) << 32 | first;
  }
  return rank_small(shared, each, need, static_cast<uint64_t>(low) << 32 | first,
                    static_cast<uint64_t>(high) << 32 | last);
}

}  // namespace fd_dsa::topk
