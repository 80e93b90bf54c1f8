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
#include <algorithm>

#include "sparse_mla_launch.cuh"
#include "sparse_mla_wide_heads.cuh"

namespace fd_dsa::wide {

// Where keys come from. A kernel for each, and for blocks alone or in clusters: what brings records
// has no registers to spare, and gets fewer of them in a kernel that does more.
enum class Source {
  kRecords,
  kDequantized,  // records, where those of the row were not dequantized before
  kBfloat16
};

#if defined(FD_DSA_HOPPER)

// Whether the records of a token's row were dequantized.
__device__ __forceinline__ bool is_dequantized(const FdDsaSparseMla& job, int64_t token) {
  const int row = __ldg(job.batch_id_per_token + token);
  const bool is_row = static_cast<uint32_t>(row) < static_cast<uint32_t>(job.num_rows);
  return is_row && __ldg(job.is_dequantized + row) != 0;
}

// All that the warpgroup does which brings tiles.
template <Source kSource>
__device__ __forceinline__ void copy_tiles(const FdDsaSparseMla& job, const Place& place,
                                           uint32_t base, int splits, int warp, int lane) {
  const bool from_records =
      kSource == Source::kRecords ||
      (kSource == Source::kDequantized && !is_dequantized(job, place.token));
  if (warp == 0 && lane == 0) {
    // after `count_tiles` the others know of it
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int half = 0; half < 2; ++half) {
        barrier_init(there(base, buffer, half), arrivals(from_records, half));
      }
    }
    barriers_ready();
  }
  const Entries entries = entries_of(job, place.token, place.rank, splits);
  const Copier copier{job, entries, base, warp, lane};
  if (from_records) {
    bring_records(copier);
  } else {
    bring_rows<kSource == Source::kDequantized>(copier);
  }
}

template <bool kFp8, int kGroup, bool kAlone>
__device__ __forceinline__ void compute(const FdDsaSparseMla& job, uint32_t base, int warp,
                                        int lane) {
  Computing<kFp8, kGroup> my(base, warp, lane);
  const int tiles = Copier::tiles_up_to_last(base);
  run(my, tiles);
  add_totals(my);
  if constexpr (kAlone) {
    store_result(job, kept_place(base), my);
  } else {
    leave_share(my);
  }
}

#endif

// Registers of a thread that computes, and of one that brings tiles: 168 each at the start.
template <bool kFp8>
struct Registers {
  static constexpr int kComputing = kFp8 ? 192 : 216, kCopying = kFp8 ? 120 : 72;
  static_assert(2 * kComputing + kCopying == 3 * 168);
};

// A block for each token and 64 heads (kAlone), or a cluster of `splits`.
template <Source kSource, bool kAlone>
__global__ void __launch_bounds__(kThreads, 1)
    attend(const __grid_constant__ FdDsaSparseMla job, int splits) {
#if defined(FD_DSA_HOPPER)
  constexpr bool kFp8 = kSource != Source::kBfloat16;
  if constexpr (kAlone) splits = 1;
  const uint32_t base = shared_address(shared_memory());
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
      compute<kFp8, 0, kAlone>(job, base, warp, lane);
    } else {
      compute<kFp8, 1, kAlone>(job, base, warp, lane);
    }
  } else {
    fewer_registers<Registers<kFp8>::kCopying>();
    copy_tiles<kSource>(job, kept_place(base), base, splits, warp, lane);
  }
  if constexpr (!kAlone) {
    cluster_sync();
    if (warpgroup < 2) combine(job, kept_place(base), base, splits, threadIdx.x);
    // nobody goes while others read here
    cluster_sync();
  }
#endif
}

// ---- among how many blocks tokens are split, and in how many launches

using sparse_mla::kMostSplits;
using sparse_mla::Room;

// Among how many blocks a token and 64 heads may be split.
inline bool may_split(int splits) {
  return (splits > 0 && splits <= 8) || splits == kMostSplits;
}

// Tokens of one launch.
struct Part {
  int tokens, splits;
};

// A second launch where the first fills the device whole times, and what is left is split more.
struct Plan {
  Part first, rest;
};

// An estimate of a launch, in tiles, as measured on an H200: rounds of blocks on the device, times
// the tiles of a block and what it costs beside them.
inline float cost_of(Part part, int groups, int tiles, const Room& room) {
  constexpr float kStart = 4.0f, kCombine = 1.0f;
  const int64_t items = static_cast<int64_t>(part.tokens) * groups;
  const int64_t rounds = (items + room[part.splits] - 1) / room[part.splits];
  return rounds * ((tiles + part.splits - 1) / part.splits + kStart +
                   (part.splits > 1 ? kCombine : 0.0f));
}

// The cheapest single launch, and its cost.
inline Part cheapest(int tokens, int groups, int tiles, const Room& room, float& least) {
  Part best = {tokens, 1};
  least = cost_of(best, groups, tiles, room);
  for (int splits = 2; splits <= std::min(kMostSplits, tiles); ++splits) {
    if (!may_split(splits) || room[splits] <= 0) continue;
    const float cost = cost_of({tokens, splits}, groups, tiles, room);
    if (cost < least) least = cost, best.splits = splits;
  }
  return best;
}

// How the tokens of a step are launched; of their numbers alone, so that repeats give the same
// bits.
inline Plan plan_for(int tokens, int groups, int topk, const Room& room) {
  constexpr float kSecondLaunch = 3.0f;
  const int tiles = (topk + kKeys - 1) / kKeys;
  float least;
  Plan best = {cheapest(tokens, groups, tiles, room, least), {0, 0}};
  for (int splits = 1; splits <= std::max(1, std::min(kMostSplits, tiles)); ++splits) {
    if (!may_split(splits) || room[splits] < groups) continue;
    const int at_once = room[splits] / groups, left = tokens % at_once;
    if (left == 0 || left == tokens) continue;
    const Part first = {tokens - left, splits};
    float cost;
    const Part rest = cheapest(left, groups, tiles, room, cost);
    cost += cost_of(first, groups, tiles, room) + kSecondLaunch;
    if (cost < least) least = cost, best = {first, rest};
  }
  return best;
}

// A job for some of the tokens.
inline FdDsaSparseMla tokens_of(FdDsaSparseMla job, int first, int tokens) {
  const int64_t rows = static_cast<int64_t>(first) * job.num_heads;
  job.q = static_cast<const char*>(job.q) + rows * (2 * kWidth);
  job.slots += static_cast<int64_t>(first) * job.topk;
  job.out = static_cast<char*>(job.out) + rows * kRank * (job.out_is_bfloat16 != 0 ? 2 : 4);
  if (job.lse != nullptr) job.lse += rows;
  if (job.dequantized != nullptr) job.batch_id_per_token += first;
  job.num_tokens = tokens;
  return job;
}

// ---- launches

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

// Static, so that two libraries in one process have flags of their own.
template <Source kSource, bool kAlone>
static int launch_form(const FdDsaSparseMla& job, int splits, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  Kernel* const kernel = attend<kSource, kAlone>;
  const cudaError_t error = sparse_mla::prepare(kernel, kBytes, prepared);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchAttribute cluster;
  return launch(config_for(job.num_tokens * groups_of(job) * splits, splits, cluster, stream),
                kernel, job, splits);
}

template <Source kSource>
static int launch_part(const FdDsaSparseMla& job, const Part& part, int first, void* stream) {
  if (part.tokens == 0) return 0;
  const FdDsaSparseMla tokens = tokens_of(job, first, part.tokens);
  return part.splits == 1 ? launch_form<kSource, true>(tokens, part.splits, stream)
                          : launch_form<kSource, false>(tokens, part.splits, stream);
}

template <Source kSource>
static int launch_plan(const FdDsaSparseMla& job, const Plan& plan, void* stream) {
  const int error = launch_part<kSource>(job, plan.first, 0, stream);
  return error != 0 ? error : launch_part<kSource>(job, plan.rest, plan.first.tokens, stream);
}

// What the device holds at once, a block for each multiprocessor and clusters; asked once, of the
// first device: those of a machine are alike.
template <Source kSource>
static const Room& room() {
  static const Room found = [] {
    Kernel* const kernel = attend<kSource, false>;
    std::atomic<uint64_t> prepared{0};
    Room room = {};
    Gpu gpu = {};
    // what fails here fails again at the launch, which says so
    if (sparse_mla::prepare(kernel, kBytes, prepared) == cudaSuccess &&
        find_gpu(gpu) == cudaSuccess) {
      room[1] = gpu.num_sms;
      for (int splits = 2; splits <= kMostSplits; ++splits) {
        if (!may_split(splits)) continue;
        cudaLaunchAttribute cluster;
        const cudaLaunchConfig_t config = config_for(splits * 1024, splits, cluster, nullptr);
        room[splits] = sparse_mla::clusters_at_once(kernel, config);
      }
    }
    room[1] = std::max(room[1], 1);
    return room;
  }();
  return found;
}

template <Source kSource>
static int launch_source(const FdDsaSparseMla& job, void* stream) {
  const Plan plan = job.splits == 0
                        ? plan_for(job.num_tokens, groups_of(job), job.topk, room<kSource>())
                        : Plan{{job.num_tokens, job.splits}, {0, 0}};
  return launch_plan<kSource>(job, plan, stream);
}

inline int launch_wide(const FdDsaSparseMla& job, void* stream) {
  if (job.num_tokens <= 0 || job.num_heads <= 0) return 0;
  if (job.splits != 0 && !may_split(job.splits)) return static_cast<int>(cudaErrorInvalidValue);
  if (job.is_fp8 == 0) return launch_source<Source::kBfloat16>(job, stream);
  return job.dequantized == nullptr ? launch_source<Source::kRecords>(job, stream)
                                    : launch_source<Source::kDequantized>(job, stream);
}

}  // namespace fd_dsa::wide

extern "C" int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMla* job, void* stream) {
  return fd_dsa::wide::launch_wide(*job, stream);
}
