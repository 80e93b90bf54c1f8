// Exact top-k of rows of scores: a block or a cluster of blocks a row.
//
// A bound from evenly spaced samples is exceeded by little more than k scores of a row. One pass
// over the row keeps those in shared memory, where the best are found by counting digits. A bound
// that fails, or a plateau of equal scores at it, is seen by the number of scores kept; passes over
// the row for each digit then serve. Counts are integers, so nothing depends on the order of
// threads.
#pragma once

#include <utility>

#include "topk_scan.cuh"

namespace fd_dsa::topk {

// Zeroes what a block counts in.
template <int kThreads>
__device__ __forceinline__ void clear(Shared& shared, uint32_t* bits, int32_t num_words) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
  for (int32_t i = threadIdx.x; i < num_words; i += kThreads) bits[i] = 0;
  if (threadIdx.x == 0) {
    shared.num_small = shared.num_kept = shared.highest = 0;
    shared.pivot = 0xffffffffu;
  }
}

// A row with at most k positions: all of them.
template <int kThreads, typename Blocks>
__device__ __forceinline__ void write_all(const Rows& rows, const Row& row) {
  int32_t* out = rows.out + row.token * rows.k;
  for (int64_t i = Blocks::rank() * kThreads + threadIdx.x; i < rows.k;
       i += Blocks::size() * kThreads) {
    out[i] = i < row.length ? entry_of(rows, row.token, static_cast<int32_t>(i)) : -1;
  }
}

// A short row: every score is a candidate.
template <int kThreads>
__device__ void choose_directly(const Rows& rows, const Row& row, uint64_t* list, uint32_t* bits,
                                int32_t num_bits, Shared& shared) {
  constexpr int kBatch = 4;
  uint32_t low = 0xffffffffu, high = 0;
  for (int32_t base = threadIdx.x; base < row.length; base += kBatch * kThreads) {
    float score[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t position = base + i * kThreads;
      score[i] = position < row.length ? __ldg(row.scores + position) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t position = base + i * kThreads;
      if (position < row.length) {
        const uint32_t image = image_of(score[i]);
        low = min(low, image);
        high = max(high, image);
        list[position] = ranked(image, position);
      }
    }
  }
  block_range<kThreads>(shared, low, high);
  const uint64_t first = static_cast<uint64_t>(low) << 32;
  const uint64_t last = static_cast<uint64_t>(high) << 32 | 0xffffffffu;
  const uint32_t k = static_cast<uint32_t>(rows.k);
  const uint64_t threshold = find_threshold<kThreads>(shared, list, row.length, k, first, last);
  write_list<kThreads>(rows, row, list, row.length, true, threshold, bits, num_bits, shared);
}

// What the blocks of a row kept, known to all of them.
struct Kept {
  uint32_t mine, below, all, highest;
};

template <typename Blocks>
__device__ __forceinline__ Kept exchange_kept(Shared& shared) {
  __syncthreads();
  const uint32_t mine = shared.num_kept;
  if (Blocks::size() == 1) return {mine, 0, mine, shared.highest};
  // all blocks have begun, so their memory can be written
  Blocks::wait();
  if (threadIdx.x < Blocks::size()) {
    Blocks::store(&shared.kept_of[Blocks::rank()], threadIdx.x, mine);
    Blocks::store(&shared.highest_of[Blocks::rank()], threadIdx.x, shared.highest);
  }
  Blocks::sync();
  const bool valid = lane_id() < Blocks::size();
  const uint32_t kept = valid ? shared.kept_of[lane_id()] : 0;
  const uint32_t highest = valid ? shared.highest_of[lane_id()] : 0;
  const uint32_t below = __reduce_add_sync(kAllLanes, lane_id() < Blocks::rank() ? kept : 0);
  return {mine, below, __reduce_add_sync(kAllLanes, kept), __reduce_max_sync(kAllLanes, highest)};
}

// A long row: candidates are the scores above a bound.
template <int kThreads, int kUnroll, int kLoads, typename Blocks>
__device__ void choose_by_bound(const Rows& rows, const Row& row, Sizes sizes, uint64_t* list,
                                uint32_t* bits, Shared& shared) {
  const int32_t num_blocks = Blocks::size(), share = (row.num_chunks - 1) / num_blocks + 1;
  const int32_t each = (share + kWarp - 1) / kWarp * kWarp;
  const int32_t begin = min(static_cast<int32_t>(Blocks::rank()) * each, row.num_chunks);
  const int32_t end = min(begin + each, row.num_chunks);
  float4 tile[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    tile[u] = load_or_none(row, begin + u * kThreads + threadIdx.x, end);
  }
  const uint32_t bound = choose_bound<kThreads, kLoads>(row, rows.k, shared);
  const uint32_t capacity = static_cast<uint32_t>(sizes.capacity);
  keep_above<kThreads, kUnroll>(row, begin, end, tile, score_of(bound), shared, list, capacity);
  const Kept kept = exchange_kept<Blocks>(shared);
  const uint32_t k = static_cast<uint32_t>(rows.k);
  if (kept.all < k || kept.all > capacity) {
    const Span span = {max(row.first_of(begin), 0), min(row.first_of(end), row.length)};
    choose_by_scans<kThreads, Blocks>(rows, row, span, kept.all < k, bound, shared,
                                      reinterpret_cast<uint32_t*>(list));
    return;
  }
  if (num_blocks > 1) {
    if (Blocks::rank() > 0) {
      for (uint32_t i = threadIdx.x; i < kept.mine; i += kThreads) {
        Blocks::store(&list[kept.below + i], 0, list[i]);
      }
      Blocks::arrive();
      return;
    }
    Blocks::sync();
  }
  const uint64_t low = static_cast<uint64_t>(bound + 1) << 32;
  const uint64_t high = static_cast<uint64_t>(kept.highest) << 32 | 0xffffffffu;
  const int32_t size = static_cast<int32_t>(kept.all);
  const uint64_t threshold = find_threshold<kThreads>(shared, list, size, k, low, high);
  write_list<kThreads>(rows, row, list, size, false, threshold, bits, sizes.num_bits, shared);
}

template <int kThreads, int kMinBlocks, int kUnroll, bool kCluster>
__global__ void __launch_bounds__(kThreads, kMinBlocks) topk_kernel(Rows rows, Sizes sizes) {
  using Blocks = Cluster<kCluster>;
  constexpr int kLoads = kThreads >= 1024 ? 1 : 1024 / kThreads;
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint64_t* list = reinterpret_cast<uint64_t*>(memory + sizeof(Shared));
  uint32_t* bits = reinterpret_cast<uint32_t*>(list + sizes.capacity);
  const int32_t index = static_cast<int32_t>(blockIdx.x / Blocks::size());
  const int64_t token = token_of(rows, index);
  if (token < 0) return;
  const Row row(rows, index, token);
  if (row.length <= rows.k) {
    write_all<kThreads, Blocks>(rows, row);
    return;
  }
  const bool is_short = row.length <= sizes.direct;
  if (is_short && Blocks::rank() > 0) return;
  if (!is_short) Blocks::arrive();
  clear<kThreads>(shared, bits, min(sizes.num_bits, row.length + kWarp) / kWarp);
  if (is_short) {
    choose_directly<kThreads>(rows, row, list, bits, sizes.num_bits, shared);
  } else {
    choose_by_bound<kThreads, kUnroll, kLoads, Blocks>(rows, row, sizes, list, bits, shared);
  }
}

template <int kThreads, int kMinBlocks, int kUnroll, bool kCluster>
int launch_variant(const Rows& rows, const Sizes& sizes, void* stream) {
  auto* kernel = topk_kernel<kThreads, kMinBlocks, kUnroll, kCluster>;
  const int bytes = static_cast<int>(sizeof(Shared)) + 8 * sizes.capacity + sizes.num_bits / 8;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && kCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return static_cast<int>(error);
  const unsigned blocks = static_cast<unsigned>(rows.num_rows) * sizes.cluster;
  cudaLaunchConfig_t config = launch_config(blocks, kThreads, stream, bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(sizes.cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = kCluster ? 1 : 0;
  return launch(config, kernel, rows, sizes);
}

// The device of the calling thread.
inline cudaError_t find_gpu(Gpu& gpu) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&gpu.num_sms, cudaDevAttrMultiProcessorCount},
      {&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& [value, attribute] : wanted) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  }
  gpu.has_clusters = major >= 9;
  return error;
}

inline int launch_topk(const Rows& rows, void* stream) {
  if (rows.num_rows <= 0 || rows.k <= 0) return 0;
  Gpu gpu = {};
  const cudaError_t error = find_gpu(gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  const Sizes sizes = choose_sizes(rows, gpu, sizeof(Shared));
  if (sizes.cluster > 1) return launch_variant<1024, 1, 2, true>(rows, sizes, stream);
  if (rows.num_rows <= gpu.num_sms) return launch_variant<1024, 1, 2, false>(rows, sizes, stream);
  return launch_variant<512, 3, 2, false>(rows, sizes, stream);
}

}  // namespace fd_dsa::topk
