// Sparse MLA for blocks of 64 heads, over FP8 records or bfloat16 latents.
//
// A block attends for 64 heads of a token, and a share of the token's entries. One warpgroup brings
// tiles of 64 keys to shared memory, in float16 (records, unless they were dequantized before) or
// bfloat16, where they are operands of both products. Two warpgroups compute: each scores every
// other tile and turns its scores into weights, and each sums up half of all latents, with weights
// that both read from shared memory; so one has the tensor cores while the other has exponentials.
// Blocks that share a token and its heads are a cluster, and add up what they have through each
// other's shared memory, in a fixed order.
//
// Source: two warpgroups that take turns over halves of the result, as FlashMLA does it; the online
// softmax over splits is that of Flash-Decoding (Dao et al. 2023).
#ifndef FD_DSA_SPARSE_MLA_WIDE_CUH
#define FD_DSA_SPARSE_MLA_WIDE_CUH

#include <cmath>

#include "sparse_mla_launch.cuh"
#include "sparse_mla_wide_heads.cuh"
#include "sparse_mla_wide_shared.cuh"
#include "sparse_mla_wide_tiles.cuh"

namespace fd_dsa::wide {

#if defined(FD_DSA_HOPPER)

// What a block works on.
struct Place {
  int64_t token;
  int first_head, heads, rank;
};

__device__ __forceinline__ Place place_of(const FdDsaSparseMla& job, int splits) {
  const int groups = (job.num_heads + kHeads - 1) / kHeads, item = blockIdx.x / splits;
  const int first_head = item % groups * kHeads;
  return {item / groups, first_head, min(job.num_heads - first_head, kHeads),
          static_cast<int>(blockIdx.x % splits)};
}

// Kept in memory over the loop over tiles, which has no registers for it.
__device__ __forceinline__ void keep_place(uint32_t base, const Place& place) {
  store_shared(base + kPlace, static_cast<int>(place.token));
  store_shared(base + kPlace + 4, place.first_head);
  store_shared(base + kPlace + 8, place.heads);
  store_shared(base + kPlace + 12, place.rank);
}

__device__ __forceinline__ Place kept_place(uint32_t base) {
  const auto kept = [&](int i) {
    return static_cast<int>(load_shared_bits(base + kPlace + i * 4));
  };
  return {kept(0), kept(1), kept(2), kept(3)};
}

__device__ __forceinline__ void store_out(const FdDsaSparseMla& job, const Place& place,
                                          int row, int column, float4 x) {
  const int64_t at =
      ((place.token * job.num_heads + place.first_head + row) * kRank + column) / 4;
  if (job.out_is_bfloat16) {
    static_cast<uint2*>(job.out)[at] = {pack_bfloat16(x.x, x.y), pack_bfloat16(x.z, x.w)};
  } else {
    static_cast<float4*>(job.out)[at] = x;
  }
}

__device__ __forceinline__ void store_lse(const FdDsaSparseMla& job, const Place& place,
                                          int row, float top, float total) {
  if (job.lse == nullptr || row >= place.heads) return;
  job.lse[place.token * job.num_heads + place.first_head + row] =
      total == 0.0f ? -INFINITY : (top + log2f(total)) * kLn2;
}

// Sums of the weights of both warpgroups' tiles.
template <bool kFp8, int kGroup>
__device__ __forceinline__ void add_totals(Computing<kFp8, kGroup>& my) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float& total = my.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (my.lane % 4 == 0) {
      store_shared(my.base + kTotals + (kGroup * kHeads + my.row(r)) * 4, total);
    }
  }
  named_barrier_apart(kOfComputing, 256);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    my.total[r] = load_shared(my.base + kTotals + my.row(r) * 4) +
                  load_shared(my.base + kTotals + (kHeads + my.row(r)) * 4);
  }
}

// Leaves a block's sums where it, and the other blocks of the cluster, can read them.
template <bool kFp8, int kGroup>
__device__ __forceinline__ void leave_share(const Computing<kFp8, kGroup>& my) {
  const uint32_t base = my.base;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t row =
        base + kTiles + (my.row(r) * kPartStride + kGroup * 256 + my.lane % 4 * 2) * 4;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      store_shared(row + j * 32, my.out[j * 4 + r * 2], my.out[j * 4 + r * 2 + 1]);
    }
    // after the barrier of `add_totals`, so nobody reads a base or a total of a warpgroup any more
    if (kGroup == 0 && my.lane % 4 == 0) {
      store_shared(base + kTops + my.row(r) * 4, my.top[r]);
      store_shared(base + kShares + my.row(r) * 4, my.total[r]);
    }
  }
}

// Puts the shares of a cluster together: each block has some of the heads. 256 threads.
__device__ __forceinline__ void combine(const FdDsaSparseMla& job, const Place& place,
                                        uint32_t base, int splits, int thread) {
  const int rows = kHeads / splits, first = place.rank * rows;
  if (thread < kHeads) {
    // `splits` neighbours have a head
    const int row = first + thread / splits;
    const uint32_t at = address_at_rank(base + row * 4, thread % splits);
    const float top = load_cluster(at + kTops), total = load_cluster(at + kShares);
    float highest = top, sum;
    for (int i = 1; i < splits; i *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, i));
    }
    float weight = top == -INFINITY ? 0.0f : exp2f(top - highest);
    sum = weight * total;
    for (int i = 1; i < splits; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (thread % splits == 0) store_lse(job, place, row, highest, sum);
    store_shared(base + kTotals + thread * 4, sum == 0.0f ? 0.0f : weight / sum);
  }
  named_barrier(kOfComputing, 256);
  const int count = min(rows, place.heads - first) * (kRank / 4);
#pragma unroll 4
  for (int i = thread; i < count; i += 256) {
    const int own = i / (kRank / 4), column = i % (kRank / 4) * 4;
    const uint32_t at = base + kTiles + ((first + own) * kPartStride + column) * 4;
    float4 sum = {0, 0, 0, 0};
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float weight = load_shared(base + kTotals + (own * splits + split) * 4);
      const float4 x = load_cluster_float4(address_at_rank(at, split));
      sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
    }
    store_out(job, place, first + own, column, sum);
  }
}

// Whether the records of a token's row were dequantized.
__device__ __forceinline__ bool is_dequantized(const FdDsaSparseMla& job, int64_t token) {
  if (job.dequantized == nullptr) return false;
  const int row = __ldg(job.batch_id_per_token + token);
  const bool is_row = static_cast<uint32_t>(row) < static_cast<uint32_t>(job.num_rows);
  return is_row && __ldg(job.is_dequantized + row) != 0;
}

// All that the warpgroup does which brings tiles.
template <bool kFp8>
__device__ __forceinline__ void copy_tiles(const FdDsaSparseMla& job, const Place& place,
                                           uint32_t base, int splits, int warp, int lane) {
  const bool from_records = kFp8 && !is_dequantized(job, place.token);
  if (warp == 0 && lane == 0) {
    // behind `count_tiles` the others know of it
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int half = 0; half < 2; ++half) {
        barrier_init(there(base, buffer, half), arrivals(from_records, half));
      }
    }
    barriers_ready();
  }
  const Entries entries = entries_of(job, place.token, place.rank, splits);
  const void* rows = kFp8 && !from_records ? job.dequantized : job.cache;
  const Copier copier{job, entries, base, warp, lane, static_cast<const char*>(rows)};
  if (from_records) {
    bring_records(copier);
  } else {
    bring_rows<kFp8>(copier);
  }
}

template <bool kFp8, int kGroup>
__device__ __forceinline__ void compute(uint32_t base, int warp, int lane) {
  Computing<kFp8, kGroup> my(base, warp, lane);
  const int tiles = Copier::tiles_up_to_last(base);
  run(my, tiles);
  add_totals(my);
  leave_share(my);
}

#endif

// Registers of a thread that computes, and of one that brings tiles: 168 each at the start.
template <bool kFp8>
struct Registers {
  static constexpr int kComputing = kFp8 ? 192 : 216, kCopying = kFp8 ? 120 : 72;
  static_assert(2 * kComputing + kCopying == 3 * 168);
};

template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1)
    attend(const __grid_constant__ FdDsaSparseMla job, int splits) {
#if defined(FD_DSA_HOPPER)
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int half = 0; half < 2; ++half) {
        barrier_init(is_free(base, buffer, half), 4 * kWarpArrivals);
      }
    }
    keep_place(base, place_of(job, splits));
  }
  __syncthreads();
  if (warpgroup < 2) {
    more_registers<Registers<kFp8>::kComputing>();
    const Place place = kept_place(base);
    put_queries<kFp8>(job, place.token, place.first_head, base, threadIdx.x / 32, lane);
    named_barrier(kStart, kThreads);
    if (warpgroup == 0) {
      compute<kFp8, 0>(base, warp, lane);
    } else {
      compute<kFp8, 1>(base, warp, lane);
    }
  } else {
    fewer_registers<Registers<kFp8>::kCopying>();
    copy_tiles<kFp8>(job, kept_place(base), base, splits, warp, lane);
  }
  if (splits > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (warpgroup < 2) combine(job, kept_place(base), base, splits, threadIdx.x);
  // nobody goes while others read here
  if (splits > 1) cluster_sync();
#endif
}

using sparse_mla::kMostSplits;

using Kernel = void(FdDsaSparseMla, int);

inline cudaLaunchConfig_t config_for(unsigned blocks, int splits, cudaLaunchAttribute& cluster,
                                     void* stream) {
  cudaLaunchConfig_t config = launch_config(blocks, kThreads, stream, kBytes);
  cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = splits;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  if (splits > 1) config.attrs = &cluster, config.numAttrs = 1;
  return config;
}

// How many clusters of a size the device holds at once.
inline cudaError_t clusters_at_once(Kernel* kernel, int splits, int& clusters) {
  // asked once for each size: GPUs of a process are of one kind
  static std::atomic<int> known[kMostSplits + 1];
  clusters = known[splits];
  if (clusters > 0) return cudaSuccess;
  cudaError_t error;
  if (splits == 1) {
    int device = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&clusters, cudaDevAttrMultiProcessorCount, device);
    }
  } else {
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t config = config_for(splits * 1024, splits, cluster, nullptr);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  }
  known[splits] = clusters;
  return error;
}

// In how many blocks the entries of a token are cut: the least estimate of rounds of blocks on the
// device, times the tiles of a block and what it costs beside them.
inline cudaError_t choose_splits(const FdDsaSparseMla& job, Kernel* kernel, int& best) {
  constexpr float kStartTiles = 4.0f, kCombineTiles = 1.0f;
  const int64_t items =
      static_cast<int64_t>(job.num_tokens) * ((job.num_heads + kHeads - 1) / kHeads);
  const int tiles = (job.topk + kKeys - 1) / kKeys;
  float least = INFINITY;
  for (int splits = 1; splits <= kMostSplits && (splits == 1 || splits <= tiles); splits *= 2) {
    int at_once = 0;
    const cudaError_t error = clusters_at_once(kernel, splits, at_once);
    if (error != cudaSuccess) return error;
    if (at_once == 0) continue;
    const int64_t rounds = (items + at_once - 1) / at_once;
    const float cost = rounds * ((tiles + splits - 1) / splits + kStartTiles +
                                 (splits > 1 ? kCombineTiles : 0.0f));
    if (cost < least) least = cost, best = splits;
  }
  return cudaSuccess;
}

// Static, so that two libraries in one process have flags of their own.
static int launch_wide(const FdDsaSparseMla& job, void* stream) {
  if (job.num_tokens <= 0 || job.num_heads <= 0) return 0;
  // a power of two: the blocks of a cluster share 64 heads when they put results together
  const bool is_power = (job.splits & (job.splits - 1)) == 0;
  if (job.splits < 0 || job.splits > kMostSplits || !is_power) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  static std::atomic<uint64_t> prepared[2] = {};
  Kernel* const kernel = job.is_fp8 ? attend<true> : attend<false>;
  cudaError_t error = sparse_mla::prepare(kernel, kBytes, prepared[job.is_fp8 ? 1 : 0]);
  int splits = job.splits > 0 ? job.splits : 1;
  if (error == cudaSuccess && job.splits == 0) error = choose_splits(job, kernel, splits);
  if (error != cudaSuccess) return static_cast<int>(error);
  const int groups = (job.num_heads + kHeads - 1) / kHeads;
  cudaLaunchAttribute cluster;
  return launch(config_for(job.num_tokens * groups * splits, splits, cluster, stream), kernel, job,
                splits);
}

}  // namespace fd_dsa::wide

#endif  // FD_DSA_SPARSE_MLA_WIDE_CUH
