// Exact top-k of rows of scores, with a block or a cluster of blocks per row.
//
// A short row stays in registers, also where the launch allows longer rows. For a longer row, evenly
// spaced samples give a bound that slightly more than k scores exceed. One pass keeps these scores
// as candidates in shared memory. Counting digits finds the k-th best candidate.
//
// The number of candidates shows a bound that failed, or a plateau of equal scores at it. Passes
// over the row for each digit serve then. Counts are integers, so the order of threads does not
// affect the result.

#include "topk_candidates.cuh"
#include "topk_scans.cuh"

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
  Lists::fill<kThreads>(shared.bins, kBins / 4, 0);
  if (threadIdx.x == 0) shared.num_small = 0;
  wait_for_inputs();
  start_next();
  const Row row(job.rows, static_cast<int32_t>(blockIdx.x));
  if (!needs_choice<kThreads, Blocks>(job, row)) return;
  choose_from_registers<kThreads, kUnroll>(job, row, shared);
}

// Chooses from rows of any length. If all chunks of a row fit, `kHeld` per thread, registers hold it.
template <int kThreads, int kMinBlocks, int kUnroll, int kHeld, bool kAhead, bool kCluster>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    bound_kernel(const __grid_constant__ Job job) {
  using Blocks = Cluster<kCluster>;
  const Lists lists(job.sizes, !kCluster);
  lists.clear<kThreads>();
  wait_for_inputs();
  start_next();
  const Row row(job.rows, static_cast<int32_t>(blockIdx.x / Blocks::size()));
  if (!needs_choice<kThreads, Blocks>(job, row)) return;
  if constexpr (kHeld > 0) {
    // rows that begin between two chunks take one chunk more
    if (row.length <= 4 * (RegisterRow<kThreads, kHeld>::kMaxChunks - 1)) {
      if (Blocks::rank() == 0) choose_from_registers<kThreads, kHeld>(job, row, lists.shared);
      return;
    }
  }
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
int launch_register_rows(const Rows& rows, const Gpu& gpu, void* stream) {
  const unsigned blocks = static_cast<unsigned>(rows.num_rows);
  cudaLaunchConfig_t config = launch_config(blocks, kThreads, stream, sizeof(Shared));
  LaunchAttributes attributes;
  if (gpu.major >= 9 && rows.starts_early != 0) start_early(config, attributes);
  return launch(config, held_kernel<kThreads, kMinBlocks, kUnroll>, job_of(rows, {}));
}

// Static, so that two libraries in one process have their own flags.
template <int kThreads, int kMinBlocks, int kUnroll, int kHeld, bool kAhead, bool kCluster>
static int launch_bound(const Rows& rows, const Sizes& sizes, const Gpu& gpu, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  auto* kernel = bound_kernel<kThreads, kMinBlocks, kUnroll, kHeld, kAhead, kCluster>;
  const cudaError_t error = prepare(kernel, gpu.device, gpu.shared_bytes, kCluster, prepared);
  if (error != cudaSuccess) return static_cast<int>(error);
  const unsigned blocks = static_cast<unsigned>(rows.num_rows) * sizes.cluster;
  const unsigned bytes = static_cast<unsigned>(sizeof(Shared)) + sizes.list_bytes();
  cudaLaunchConfig_t config = launch_config(blocks, kThreads, stream, bytes);
  LaunchAttributes attributes;
  if (kCluster) set_cluster(config, attributes, sizes.cluster);
  if (gpu.major >= 9 && rows.starts_early != 0) start_early(config, attributes);
  return launch(config, kernel, job_of(rows, sizes));
}

// Launches the kernel for rows that may not fit into registers.
inline int launch_any_length(const Rows& rows, const Sizes& sizes, bool many, const Gpu& gpu,
                             void* stream) {
  if (sizes.cluster > 1) return launch_bound<1024, 1, 2, 2, true, true>(rows, sizes, gpu, stream);
  if (many) return launch_bound<512, 2, 4, 4, false, false>(rows, sizes, gpu, stream);
  return launch_bound<1024, 1, 4, 2, false, false>(rows, sizes, gpu, stream);
}

inline int launch_topk(const Rows& rows, void* stream) {
  if (rows.num_rows <= 0 || rows.k <= 0) return 0;
  Gpu gpu = {};
  const cudaError_t error = find_gpu(gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  // rows that begin between two chunks take one chunk more
  const bool aligned =
      reinterpret_cast<uintptr_t>(rows.logits) % 16 == 0 && rows.row_stride % 4 == 0;
  const int64_t chunks = (static_cast<int64_t>(rows.width) + 3) / 4 + (aligned ? 0 : 1);
  if (rows.width <= rows.k || chunks <= RegisterRow<512, 2>::kMaxChunks) {
    return launch_register_rows<512, 3, 2>(rows, gpu, stream);
  }
  // with several rows per multiprocessor, blocks of half the size are faster, as measured on an
  // H200
  const bool many = rows.num_rows > gpu.num_sms;
  if (chunks <= RegisterRow<1024, 2>::kMaxChunks) {
    return many ? launch_register_rows<512, 3, 4>(rows, gpu, stream)
                : launch_register_rows<1024, 1, 2>(rows, gpu, stream);
  }
  return launch_any_length(rows, choose_sizes(rows, gpu, sizeof(Shared)), many, gpu, stream);
}

}  // namespace fd_dsa::topk

extern "C" int fd_dsa_topk_cuda(const FdDsaTopk* rows, void* stream) {
  return fd_dsa::topk::launch_topk(*rows, stream);
}

extern "C" int fd_dsa_topk_bytes() { return static_cast<int>(sizeof(FdDsaTopk)); }
