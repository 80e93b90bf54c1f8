// Exact top-k of rows of scores: a block or a cluster of blocks a row.
//
// A short row stays in registers. Of a longer one a bound is taken from evenly spaced samples,
// which little more than k scores exceed: one pass keeps those in shared memory. Among what is held
// the k-th best is found by counting digits. A bound that fails, or a plateau of equal scores at
// it, is seen by the number of scores kept; passes over the row for each digit then serve. Counts
// are integers, so nothing depends on the order of threads.
#pragma once

#include <utility>

#include "topk_bound.cuh"
#include "topk_held.cuh"
#include "topk_scan.cuh"
#include "topk_select.cuh"

namespace fd_dsa::topk {

// The parts of shared memory whose sizes the host chooses.
struct Lists {
  Shared& shared;
  uint64_t* keys;
  Order order;

  __device__ __forceinline__ explicit Lists(const Sizes& sizes)
      : shared(*reinterpret_cast<Shared*>(shared_memory())) {
    keys = reinterpret_cast<uint64_t*>(shared_memory() + sizeof(Shared));
    order.bits = reinterpret_cast<uint32_t*>(keys + sizes.capacity);
    order.before = order.bits + sizes.num_bits / 32;
    order.num_bits = sizes.num_bits;
    order.chosen = reinterpret_cast<int32_t*>(order.before + sizes.num_bits / 64);
  }

  // Zeroes what is counted in.
  template <int kThreads>
  __device__ __forceinline__ void clear() const {
    uint4* words = reinterpret_cast<uint4*>(order.bits);
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
    for (int i = threadIdx.x; i < kSampleBins; i += kThreads) {
      shared.sample_bins[i] = 0;
      shared.sample_low[i] = 0xffffffffu;
    }
    for (int32_t i = threadIdx.x; i < order.num_bits / 128; i += kThreads) {
      words[i] = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x == 0) {
      shared.num_small = shared.num_kept = shared.num_sent = shared.highest = 0;
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

// Brings the candidates of all blocks to that of rank 0; the list is whole there alone.
// Returns how many there are, whether they fit or not.
template <int kThreads, typename Blocks>
__device__ __forceinline__ uint32_t send_kept(Shared& shared, List& list) {
  __syncthreads();
  list.kept = shared.num_kept;
  if (Blocks::size() == 1) return list.kept;
  // all blocks have begun, and cleared what others count in
  Blocks::wait();
  if (Blocks::rank() > 0) {
    if (threadIdx.x == 0) {
      shared.sent_to = Blocks::add(&shared.num_sent, 0, list.kept);
      Blocks::max(&shared.highest, 0, shared.highest);
    }
    __syncthreads();
    const uint32_t to = shared.sent_to;
    for (uint32_t i = threadIdx.x; i < list.kept && to + i < list.capacity; i += kThreads) {
      Blocks::store(&list.keys[to + i], 0, list.keys[list.capacity - 1 - i]);
    }
  }
  Blocks::sync();
  list.sent = Blocks::load(&shared.num_sent, 0);
  return list.sent + Blocks::load(&shared.num_kept, 0);
}

// A long row: candidates are the scores above a bound.
template <int kThreads, int kUnroll, bool kAhead, typename Blocks>
__device__ __forceinline__ void choose_by_bound(const Job& job, const Row& row,
                                                const Lists& lists) {
  constexpr int kLoads = kThreads >= kMaxSamples / 4 ? 1 : kMaxSamples / 4 / kThreads;
  const int32_t num_blocks = Blocks::size(), share = (row.num_chunks - 1) / num_blocks + 1;
  const int32_t each = (share + kWarp - 1) / kWarp * kWarp;
  const int32_t begin = min(static_cast<int32_t>(Blocks::rank()) * each, row.num_chunks);
  const int32_t end = min(begin + each, row.num_chunks);
  const uint32_t k = static_cast<uint32_t>(job.rows.k);
  const uint32_t capacity = static_cast<uint32_t>(job.sizes.capacity);
  Shared& shared = lists.shared;
  float4 tile[kUnroll];
  load_tile<kThreads>(row, begin + threadIdx.x, end, tile);
  const uint32_t bound = choose_bound<kThreads, kLoads>(row, job.rows.k, shared);
  keep_above<kThreads, kUnroll, kAhead>(row, begin, end, tile, score_of(bound), shared, lists.keys,
                                        capacity);
  List list = {lists.keys, 0, 0, capacity};
  const uint32_t all = send_kept<kThreads, Blocks>(shared, list);
  if (all < k || all > capacity) {
    const Span span = {max(row.first_of(begin), 0), min(row.first_of(end), row.length)};
    choose_by_scans<kThreads, Blocks>(job, row, span, all < k, bound, shared,
                                      reinterpret_cast<uint32_t*>(lists.keys));
    return;
  }
  if (Blocks::rank() > 0) {
    Blocks::arrive();
    return;
  }
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

// Whether something of a row is left out; where nothing is, it is written here.
template <int kThreads, typename Blocks>
__device__ __forceinline__ bool needs_choice(const Job& job, const Row& row) {
  if (row.length > job.rows.k) return true;
  write_all<kThreads, Blocks>(job, row);
  return false;
}

// Rows that fit into the registers of a block.
template <int kThreads, int kMinBlocks, int kUnroll>
__global__ void __launch_bounds__(kThreads, kMinBlocks) held_kernel(Job job) {
  using Blocks = Cluster<false>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
  if (threadIdx.x == 0) shared.num_small = 0;
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  const int64_t token = token_of(job.rows, index);
  if (token < 0) return;
  const Row row(job.rows, index, token);
  if (!needs_choice<kThreads, Blocks>(job, row)) return;
  choose_held<kThreads, kUnroll>(job, row, shared);
}

// Rows of any length.
template <int kThreads, int kMinBlocks, int kUnroll, bool kAhead, bool kCluster>
__global__ void __launch_bounds__(kThreads, kMinBlocks) bound_kernel(Job job) {
  using Blocks = Cluster<kCluster>;
  const Lists lists(job.sizes);
  lists.clear<kThreads>();
  const int32_t index = static_cast<int32_t>(blockIdx.x / Blocks::size());
  const int64_t token = token_of(job.rows, index);
  if (token < 0) return;
  const Row row(job.rows, index, token);
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

template <int kThreads, int kMinBlocks, int kUnroll, bool kAhead, bool kCluster>
int launch_bound(const Rows& rows, const Sizes& sizes, void* stream) {
  auto* kernel = bound_kernel<kThreads, kMinBlocks, kUnroll, kAhead, kCluster>;
  const int bytes = static_cast<int>(sizeof(Shared)) + sizes.list_bytes();
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
  return launch(config, kernel, job_of(rows, sizes));
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
  // rows that begin off a chunk take one more
  const bool aligned =
      reinterpret_cast<uintptr_t>(rows.logits) % 16 == 0 && rows.row_stride % 4 == 0;
  const int64_t chunks = (static_cast<int64_t>(rows.width) + 3) / 4 + (aligned ? 0 : 1);
  if (rows.width <= rows.k || chunks <= Held<512, 2>::kMostChunks) {
    return launch_held<512, 2, 2>(rows, stream);
  }
  if (chunks <= Held<1024, 2>::kMostChunks) return launch_held<1024, 1, 2>(rows, stream);
  Gpu gpu = {};
  const cudaError_t error = find_gpu(gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  const Sizes sizes = choose_sizes(rows, gpu, sizeof(Shared));
  if (sizes.cluster > 1) return launch_bound<1024, 1, 2, true, true>(rows, sizes, stream);
  if (rows.num_rows <= gpu.num_sms) {
    return launch_bound<1024, 1, 2, true, false>(rows, sizes, stream);
  }
  return launch_bound<512, 3, 2, false, false>(rows, sizes, stream);
}

}  // namespace fd_dsa::topk
