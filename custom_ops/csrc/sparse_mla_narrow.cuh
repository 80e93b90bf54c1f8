// Sparse MLA for 1 to 32 heads over FP8 records, on Hopper.
//
// Keys are the rows of both products, so that no row is padding: scores^T = K Q^T and
// out^T = V^T P^T. Records lie in shared memory as they are; e4m3 codes become float16, which holds
// them exactly, on their way into registers, once as rows and once as columns. Scales never touch
// latents: they multiply the scores over 128 latents, and the weights of 128 latents.
//
// Up to 8 heads: the four warps of a warpgroup have 128 latents of every key each, for both
// products: what they exchange are parts of scores, and weights. More heads: see
// sparse_mla_narrow_warpgroups.cuh. Either way other warps copy tiles ahead, and blocks that share
// a token are a cluster; they add up what they have through each other's shared memory, in a fixed
// order.
#ifndef FD_DSA_SPARSE_MLA_NARROW_CUH
#define FD_DSA_SPARSE_MLA_NARROW_CUH

#include <algorithm>

#include "sparse_mla_launch.cuh"
#include "sparse_mla_narrow_copy.cuh"
#include "sparse_mla_narrow_results.cuh"
#include "sparse_mla_narrow_walk.cuh"
#include "sparse_mla_narrow_warpgroups.cuh"

namespace fd_dsa::narrow {

// A cluster of blocks for each token.
template <int kHeads, Form kForm>
__global__ void __launch_bounds__(Layout<kHeads, kForm>::kThreads,
                                  Layout<kHeads, kForm>::kBlocksPerSm)
    narrow_kernel(const __grid_constant__ FdDsaSparseMla job) {
#if defined(FD_DSA_HOPPER)
  using Shape = Layout<kHeads, kForm>;
  const Place my = begin<Shape>(job);
  if (my.warp >= 4 * Shape::kGroups) {
    copy_and_wait<Shape>(job, my, 4 * Shape::kGroups);
    return;
  }
  more_registers<Shape::kMany>();
  const auto [base, blocks, rank, warp, lane, token, tiles] = my;
  const bool is_alone = blocks == 1;
  const int group = warp / 4, member = warp % 4;
  Queries<kHeads> queries;
  State<kHeads> state;
  load_queries<kHeads, kForm>(job, token, queries, state, base, group, member, lane);
  attend_tiles<kHeads, kForm>(state, queries, base, tiles, group, member, lane);
  put_stats<kHeads, kForm>(state, base, group, member, lane);
  if (Shape::kParts == 1 && is_alone) {
    store_results<kHeads, kForm>(job, token, state, base, group, member, lane);
    return;
  }
  put_part<kHeads, kForm>(state, base, group, member, lane);
  if (is_alone) {
    exchange_barrier();
    combine_own<kHeads, kForm>(job, token, base);
    return;
  }
  combine<kHeads, kForm>(job, token, base, rank, blocks);
#endif
}

// ---- launches

using sparse_mla::kMostSplits;
using sparse_mla::Room;

// clusters of more than 8 blocks are slow to start unless there are few
constexpr int kMostOfMany = 8, kFewTokens = 4;

// Among how many blocks a token is split: the least estimate, in tiles, of rounds of clusters times
// the tiles of a block and what it costs beside them; and of putting results together.
inline int32_t splits_for(int32_t num_tokens, int32_t topk, const Room& room) {
  // in tiles, as measured on an H200
  constexpr double kStart = 3.0, kCombine = 1.0, kEach = 0.1;
  const int32_t tiles = (topk + kTile - 1) / kTile;
  const int32_t most = std::min(num_tokens > kFewTokens ? kMostOfMany : kMostSplits, tiles);
  int32_t best = 1;
  double least = 0.0;
  for (int32_t splits = 1; splits <= most; ++splits) {
    if (room[splits] <= 0) continue;
    const int32_t rounds = (num_tokens - 1) / room[splits] + 1;
    const double combine = splits > 1 ? kCombine + kEach * splits : 0.0;
    const double cost = rounds * ((tiles - 1) / splits + 1 + kStart) + combine;
    if (splits == 1 || cost < least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}

// Static, so that two libraries in one process have flags of their own.
template <typename Shape>
static int launch_shape(FdDsaSparseMla job, void (*kernel)(FdDsaSparseMla), void* stream) {
  static std::atomic<uint64_t> prepared{0};
  const cudaError_t error = sparse_mla::prepare(kernel, Shape::kBytes, prepared);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchConfig_t config = launch_config(1, Shape::kThreads, stream, Shape::kBytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  config.attrs = &attribute;
  config.numAttrs = 1;
  auto set_splits = [&](unsigned splits) {
    config.gridDim = dim3(static_cast<unsigned>(job.num_tokens) * splits);
    attribute.val.clusterDim = {splits, 1, 1};
  };
  if (job.splits == 0) {
    // of the first device: those of a machine are alike
    static const Room room = [&] {
      Room found = {};
      for (unsigned splits = 1; splits <= kMostSplits; ++splits) {
        set_splits(splits);
        config.gridDim = dim3(splits);
        found[splits] = sparse_mla::clusters_at_once(kernel, config);
      }
      return found;
    }();
    job.splits = splits_for(job.num_tokens, job.topk, room);
  }
  set_splits(static_cast<unsigned>(job.splits));
  return launch(config, kernel, job);
}

template <Form kForm>
static int launch_form(const FdDsaSparseMla& job, void* stream) {
  return launch_shape<Layout<8, kForm>>(job, narrow_kernel<8, kForm>, stream);
}

template <int kHeads>
static int launch_warpgroups(const FdDsaSparseMla& job, void* stream) {
  return launch_shape<Layout<kHeads, Form::kWarpgroups>>(job, warpgroup_kernel<kHeads>, stream);
}

inline int launch_narrow(const FdDsaSparseMla& job, void* stream) {
  if (job.num_tokens <= 0 || job.num_heads <= 0) return 0;
  if (job.num_heads > 32 || job.is_fp8 == 0 || job.splits < 0 || job.splits > kMostSplits) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  if (job.num_heads > 16) return launch_warpgroups<32>(job, stream);
  if (job.num_heads > 8) return launch_warpgroups<16>(job, stream);
  // two blocks on a multiprocessor: where there are tokens for them, and where a block has next to
  // nothing to do
  constexpr int32_t kMany = 132;
  const bool is_one = job.num_tokens > kMany || job.num_tokens <= kFewTokens;
  return is_one ? launch_form<Form::kOne>(job, stream)
                : launch_form<Form::kTakeTurns>(job, stream);
}

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_CUH
