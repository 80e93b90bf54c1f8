// Sparse MLA for blocks of 64 heads, over FP8 records or bfloat16 latents.
//
// A block attends for 64 heads of a token and a share of the token's entries. One warpgroup copies
// tiles of 64 keys to shared memory, where they are operands of both GEMMs. Records become float16
// unless they were dequantized before, and latents stay bfloat16. Two warpgroups compute. Each
// scores every other tile and turns its scores into weights. Each also sums up half of all latents,
// with weights that both read from shared memory. So one uses the tensor cores while the other
// computes exponentials. Blocks that share a token and its heads are a cluster. They add up their
// partial results through each other's shared memory, in a fixed order.
//
// Sources: FlashMLA for two warpgroups that take turns over halves of the result; Flash-Decoding
// (Dao et al. 2023) for the online softmax over splits.
#include <algorithm>

#include "sparse_mla_launch.cuh"
#include "sparse_mla_wide_heads.cuh"

namespace fd_dsa::wide {

// The source of keys.
//
// Each source has its own kernels, for single blocks and for clusters. The warps that copy records
// need all their registers, and a kernel with more cases would leave them fewer.
enum class Source {
  kRecords,
  kDequantized,  // records, except those of rows that are dequantized already
  kBfloat16
};

#if defined(FD_DSA_HOPPER)

// Returns whether the records of a token's row are dequantized.
__device__ __forceinline__ bool is_dequantized(const FdDsaSparseMla& job, int64_t token) {
  const int row = __ldg(job.batch_id_per_token + token);
  const bool is_row = static_cast<uint32_t>(row) < static_cast<uint32_t>(job.num_rows);
  return is_row && __ldg(job.is_dequantized + row) != 0;
}

// Runs the copying warpgroup.
template <Source kSource>
__device__ __forceinline__ void copy_tiles(const FdDsaSparseMla& job, const Place& place,
                                           uint32_t base, int splits, int warp, int lane) {
  const bool from_records =
      kSource == Source::kRecords ||
      (kSource == Source::kDequantized && !is_dequantized(job, place.token));
  if (warp == 0 && lane == 0) {
    // the other warps use these barriers only after `count_tiles`
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int half = 0; half < 2; ++half) {
        barrier_init(is_full(base, buffer, half), arrivals(from_records, half));
      }
    }
    barriers_ready();
  }
  const Entries entries = entries_of(job, place.token, place.rank, splits);
  const Copier copier{job, entries, base, warp, lane};
  if (from_records) {
    copy_records(copier);
  } else {
    copy_rows<kSource == Source::kDequantized>(copier);
  }
}

template <bool kFp8, int kGroup, bool kAlone>
__device__ __forceinline__ void compute(const FdDsaSparseMla& job, uint32_t base, int warp,
                                        int lane) {
  ComputeWarpgroup<kFp8, kGroup> state(base, warp, lane);
  const int tiles = Copier::tiles_up_to_last(base);
  run(state, tiles);
  add_totals(state);
  if constexpr (kAlone) {
    store_result(job, kept_place(base), state);
  } else {
    store_partial(state);
  }
}

#endif

// Attends with a block per token and 64 heads (kAlone), or with a cluster of `splits` blocks.
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
  }
  wait_for_inputs();
  start_next();
  if (threadIdx.x == 0) keep_place(base, place_of(job, splits));
  __syncthreads();
  if (warpgroup < 2) {
    more_registers<Registers<kFp8>::kComputeRegisters>();
    const Place place = kept_place(base);
    store_queries<kFp8>(job, place.token, place.first_head, base, threadIdx.x / 32, lane);
    named_barrier(kStart, kThreads);
    if (warpgroup == 0) {
      compute<kFp8, 0, kAlone>(job, base, warp, lane);
    } else {
      compute<kFp8, 1, kAlone>(job, base, warp, lane);
    }
  } else {
    fewer_registers<Registers<kFp8>::kCopyRegisters>();
    copy_tiles<kSource>(job, kept_place(base), base, splits, warp, lane);
  }
  if constexpr (!kAlone) {
    cluster_sync();
    if (warpgroup < 2) combine(job, kept_place(base), base, splits, threadIdx.x);
    // blocks stay until the others have read their memory
    cluster_sync();
  }
#endif
}

// ---- the splits of tokens, and the launches

using sparse_mla::kMaxSplits;
using sparse_mla::Room;

// Returns whether a token and 64 heads may be split among this many blocks.
inline bool is_split_allowed(int splits) {
  return (splits > 0 && splits <= 8) || splits == kMaxSplits;
}

// The tokens of one launch.
struct Part {
  int tokens, splits;
};

// One or two launches. The first fills the device a whole number of times, and the second splits
// the rest more.
struct Plan {
  Part first, rest;
};

// Estimates the cost of a launch in tiles, as measured on an H200.
//
// The cost is the rounds of blocks on the device times the tiles and fixed cost of a block.
inline float cost_of(Part part, int groups, int tiles, const Room& room) {
  constexpr float kStart = 4.0f, kCombine = 1.0f;
  const int64_t items = static_cast<int64_t>(part.tokens) * groups;
  const int64_t rounds = (items + room[part.splits] - 1) / room[part.splits];
  return rounds * ((tiles + part.splits - 1) / part.splits + kStart +
                   (part.splits > 1 ? kCombine : 0.0f));
}

// Returns the cheapest single launch, and its cost.
inline Part cheapest(int tokens, int groups, int tiles, const Room& room, float& lowest_cost) {
  Part best = {tokens, 1};
  lowest_cost = cost_of(best, groups, tiles, room);
  for (int splits = 2; splits <= std::min(kMaxSplits, tiles); ++splits) {
    if (!is_split_allowed(splits) || room[splits] <= 0) continue;
    const float cost = cost_of({tokens, splits}, groups, tiles, room);
    if (cost < lowest_cost) lowest_cost = cost, best.splits = splits;
  }
  return best;
}

// Plans the launches of a step by the number of tokens only, so that repeats give the same bits.
inline Plan plan_for(int tokens, int groups, int topk, const Room& room) {
  constexpr float kSecondLaunch = 3.0f;
  const int tiles = (topk + kKeys - 1) / kKeys;
  float lowest_cost;
  Plan best = {cheapest(tokens, groups, tiles, room, lowest_cost), {0, 0}};
  for (int splits = 1; splits <= std::max(1, std::min(kMaxSplits, tiles)); ++splits) {
    if (!is_split_allowed(splits) || room[splits] < groups) continue;
    const int at_once = room[splits] / groups, left = tokens % at_once;
    if (left == 0 || left == tokens) continue;
    const Part first = {tokens - left, splits};
    float cost;
    const Part rest = cheapest(left, groups, tiles, room, cost);
    cost += cost_of(first, groups, tiles, room) + kSecondLaunch;
    if (cost < lowest_cost) lowest_cost = cost, best = {first, rest};
  }
  return best;
}

// Returns the job of some of the tokens.
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

inline cudaLaunchConfig_t config_for(unsigned blocks, int splits, LaunchAttributes& attributes,
                                     void* stream) {
  cudaLaunchConfig_t config = launch_config(blocks, kThreads, stream, kBytes);
  if (splits > 1) set_cluster(config, attributes, splits);
  return config;
}

// Static, so that two libraries in one process have their own flags.
template <Source kSource, bool kAlone>
static int launch_form(const FdDsaSparseMla& job, int splits, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  Kernel* const kernel = attend<kSource, kAlone>;
  Gpu gpu = {};
  const cudaError_t error = prepare_on_hopper(kernel, kBytes, true, prepared, gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  LaunchAttributes attributes;
  const int blocks = job.num_tokens * groups_of(job) * splits;
  cudaLaunchConfig_t config = config_for(blocks, splits, attributes, stream);
  if (job.starts_early != 0) start_early(config, attributes);
  return launch(config, kernel, job, splits);
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

// Returns the blocks, one per multiprocessor, and the clusters that run at the same time.
//
// The first device is queried once, because the devices of a machine are alike.
template <Source kSource>
static const Room& room() {
  static const Room found = [] {
    Kernel* const kernel = attend<kSource, false>;
    std::atomic<uint64_t> prepared{0};
    Room room = {};
    Gpu gpu = {};
    // an error here appears again at the launch, which reports it
    if (prepare_on_hopper(kernel, kBytes, true, prepared, gpu) == cudaSuccess) {
      room[1] = gpu.num_sms;
      for (int splits = 2; splits <= kMaxSplits; ++splits) {
        if (!is_split_allowed(splits)) continue;
        LaunchAttributes attributes;
        const cudaLaunchConfig_t config = config_for(splits * 1024, splits, attributes, nullptr);
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
  if (job.splits != 0 && !is_split_allowed(job.splits)) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  if (job.is_fp8 == 0) return launch_source<Source::kBfloat16>(job, stream);
  return job.dequantized == nullptr ? launch_source<Source::kRecords>(job, stream)
                                    : launch_source<Source::kDequantized>(job, stream);
}

}  // namespace fd_dsa::wide

extern "C" int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMla* job, void* stream) {
  return fd_dsa::wide::launch_wide(*job, stream);
}
