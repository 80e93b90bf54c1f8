// Exact top-k of rows of scores: a block or a cluster of blocks a row.
//
// A short row stays in registers. Of a longer one a bound is taken from evenly spaced samples,
// which little more than k scores exceed: one pass keeps those in shared memory. Among what is held
// the k-th best is found by counting digits. A bound that fails, or a plateau of equal scores at
// it, is seen by the number of scores kept; passes over the row for each digit then serve. Counts
// are integers, so nothing depends on the order of threads.
#pragma once

#include <atomic>
#include <utility>

#include "topk_bound.cuh"
#include "topk_held.cuh"
#include "topk_scan.cuh"
#include "topk_select.cuh"

namespace fd_dsa::topk {

// The parts of shared memory whose sizes the host chooses.
struct Lists {
  Shared& shared;
  Kept kept;
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

  // Prepares what is counted in.
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

// A row with at most k positions: all of them.
template <int kThreads, typename Blocks>
__device__ __forceinline__ void write_all(const Job& job, const Row& row) {
  int32_t* out = job.rows.out + row.token * job.rows.k;
#pragma unroll 1
  for (int64_t i = Blocks::rank() * kThreads + threadIdx.x; i < job.rows.k;
       i += Blocks::size() * kThreads) {
    out[i] = i < row.length ? entry_at(job, row.token, static_cast<int32_t>(i)) : -1;
  }
}

// A long row: candidates are the scores above a bound.
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
  const Kept& kept = lists.kept;
  Shared& shared = lists.shared;
  Tile<kThreads, kUnroll> tile;
  tile.load(row, begin + threadIdx.x, end);
  const uint32_t bound = choose_bound<kThreads, kLoads>(row, job.rows.k, shared);
  if (rank == 0 && warp_id() == 0) {
    keep_edges(row, score_of(bound), shared, kept.positions, kept.capacity);
  }
  keep_above<kThreads, kUnroll, kAhead>(row, begin, end, tile, score_of(bound), shared,
                                        kept.positions, kept.capacity);
  const uint32_t all = gather_kept<kThreads, Blocks>(row, kept, shared);
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
  // others may still read how many there are
  if (num_blocks > 1) Blocks::sync();
}

// Whether something of a row is left out; where nothing is, all of it is written here.
template <int kThreads, typename Blocks>
__device__ __forceinline__ bool needs_choice(const Job& job, const Row& row) {
  if (row.length > job.rows.k) return true;
  write_all<kThreads, Blocks>(job, row);
  return false;
}

// Rows that fit into the registers of a block.
template <int kThreads, int kMinBlocks, int kUnroll>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    held_kernel(const __grid_constant__ Job job) {
  using Blocks = Cluster<false>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const Row row(job.rows, static_cast<int32_t>(blockIdx.x));
  Lists::fill<kThreads>(shared.bins, kBins / 4, 0);
  if (threadIdx.x == 0) shared.num_small = 0;
  if (!needs_choice<kThreads, Blocks>(job, row)) return;
  choose_held<kThreads, kUnroll>(job, row, shared);
}

// Rows of any length.
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

inline Job job_of(const Rows& rows, const Sizes& sizes) {
  Job job = {rows, sizes, -1};
  for (int shift = 0; shift < 31; ++shift) {
    if (rows.block_size == 1 << shift) job.block_shift = shift;
  }
  return job;
}

template <int kThreads, int kMinBlocks, int kUnroll>
int launch_held(const Rows& rows, void* stream) {
  const unsigned blocks = static_cast<unsigned>(rows.num_rows);
  return launch(launch_config(blocks, kThreads, stream, sizeof(Shared)),
                held_kernel<kThreads, kMinBlocks, kUnroll>, job_of(rows, {}));
}

// Lets a kernel have all shared memory of a device and clusters of any size; asked once for each
// kernel and device, `done` has a bit for each device.
template <typename Kernel>
cudaError_t prepare(Kernel* kernel, const Gpu& gpu, bool clusters, std::atomic<uint64_t>& done) {
  const uint64_t bit = uint64_t{1} << gpu.device % 64;
  if ((done.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           gpu.shared_bytes);
  if (error == cudaSuccess && clusters) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Static, so that two libraries in one process have flags of their own.
template <int kThreads, int kMinBlocks, int kUnroll, bool kAhead, bool kCluster>
static int launch_bound(const Rows& rows, const Sizes& sizes, const Gpu& gpu, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  auto* kernel = bound_kernel<kThreads, kMinBlocks, kUnroll, kAhead, kCluster>;
  const cudaError_t error = prepare(kernel, gpu, kCluster, prepared);
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

// The device of the calling thread.
inline cudaError_t find_gpu(Gpu& gpu) {
  int major = 0;
  cudaError_t error = cudaGetDevice(&gpu.device);
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&gpu.num_sms, cudaDevAttrMultiProcessorCount},
      {&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& [value, attribute] : wanted) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, gpu.device);
  }
  gpu.has_clusters = major >= 9;
  return error;
}

inline int launch_topk(const Rows& rows, void* stream) {
  if (rows.num_rows <= 0 || rows.k <= 0) return 0;
  // rows that begin off a chunk take one more
  const bool aligned =
      reinterpret_cast<uintptr_t>(rows.logits) % 16 == 0 && rows.row_stride % 4 == 0;
  const int64_t chunks = (static_cast<int64_t>(rows.width) + 3) / 4 + (aligned ? 0 : 1);
  if (rows.width <= rows.k || chunks <= Held<512, 2>::kMostChunks) {
    return launch_held<512, 2, 2>(rows, stream);
  }
  Gpu gpu = {};
  const cudaError_t error = find_gpu(gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  // blocks of half the size where every multiprocessor gets several rows: measured on an H200
  const bool many = rows.num_rows > gpu.num_sms;
  if (chunks <= Held<1024, 2>::kMostChunks) {
    return many ? launch_held<512, 3, 4>(rows, stream) : launch_held<1024, 1, 2>(rows, stream);
  }
  const Sizes sizes = choose_sizes(rows, gpu, sizeof(Shared));
  if (sizes.cluster > 1) return launch_bound<1024, 1, 2, true, true>(rows, sizes, gpu, stream);
  if (many) return launch_bound<512, 2, 4, false, false>(rows, sizes, gpu, stream);
  return launch_bound<1024, 1, 4, false, false>(rows, sizes, gpu, stream);
}

}  // namespace fd_dsa::topk
