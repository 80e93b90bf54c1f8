// The launcher of sparse MLA for 1 to 32 heads, which chooses the kernel and the splits.
#include <algorithm>

#include "sparse_mla_launch.cuh"
#include "sparse_mla_narrow_warpgroups.cuh"
#include "sparse_mla_narrow_warps.cuh"

namespace fd_dsa::narrow {

using sparse_mla::kMaxSplits;
using sparse_mla::Room;

// clusters of more than 8 blocks are slow to start unless there are few of them
constexpr int kMaxPortableSplits = 8, kFewTokens = 4;

// Returns the number of blocks for a token with the lowest estimated cost.
//
// The estimate, in tiles, is the rounds of clusters times the tiles and fixed cost of a block, plus
// the cost of adding up the results.
inline int32_t splits_for(int32_t num_tokens, int32_t topk, const Room& room) {
  // in tiles, as measured on an H200
  constexpr double kStart = 3.0, kCombine = 1.0, kCombinePerSplit = 0.1;
  const int32_t tiles = (topk + kTile - 1) / kTile;
  const int32_t max_splits =
      std::min(num_tokens > kFewTokens ? kMaxPortableSplits : kMaxSplits, tiles);
  int32_t best = 1;
  double lowest_cost = 0.0;
  for (int32_t splits = 1; splits <= max_splits; ++splits) {
    if (room[splits] <= 0) continue;
    const int32_t rounds = (num_tokens - 1) / room[splits] + 1;
    const double combine = splits > 1 ? kCombine + kCombinePerSplit * splits : 0.0;
    const double cost = rounds * ((tiles - 1) / splits + 1 + kStart) + combine;
    if (splits == 1 || cost < lowest_cost) {
      best = splits;
      lowest_cost = cost;
    }
  }
  return best;
}

// Static, so that two libraries in one process have their own flags.
template <typename Shape>
static int launch_shape(FdDsaSparseMla job, void (*kernel)(FdDsaSparseMla), void* stream) {
  static std::atomic<uint64_t> prepared{0};
  Gpu gpu = {};
  const cudaError_t error = prepare_on_hopper(kernel, Shape::kBytes, true, prepared, gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchConfig_t config = launch_config(1, Shape::kThreads, stream, Shape::kBytes);
  LaunchAttributes attributes;
  auto set_splits = [&](int splits) {
    config.gridDim = dim3(static_cast<unsigned>(job.num_tokens * splits));
    config.numAttrs = 0;
    set_cluster(config, attributes, splits);
  };
  if (job.splits == 0) {
    // from the first device, because the devices of a machine are alike
    static const Room room = [&] {
      Room found = {};
      for (int splits = 1; splits <= kMaxSplits; ++splits) {
        set_splits(splits);
        config.gridDim = dim3(static_cast<unsigned>(splits));
        found[splits] = sparse_mla::clusters_at_once(kernel, config);
      }
      return found;
    }();
    job.splits = splits_for(job.num_tokens, job.topk, room);
  }
  set_splits(job.splits);
  if (job.starts_early != 0) start_early(config, attributes);
  return launch(config, kernel, job);
}

inline int launch_narrow(const FdDsaSparseMla& job, void* stream) {
  if (job.num_tokens <= 0 || job.num_heads <= 0) return 0;
  if (job.num_heads > 32 || job.is_fp8 == 0 || job.splits < 0 || job.splits > kMaxSplits) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  if (job.num_heads > 16) {
    return launch_shape<warpgroups::Layout<32>>(job, warpgroups::kernel<32>, stream);
  }
  if (job.num_heads > 8) {
    return launch_shape<warpgroups::Layout<16>>(job, warpgroups::kernel<16>, stream);
  }
  // one warpgroup per block, with two blocks per multiprocessor, for many tokens and for very few
  constexpr int32_t kManyTokens = 132;
  const bool one_warpgroup = job.num_tokens > kManyTokens || job.num_tokens <= kFewTokens;
  return one_warpgroup ? launch_shape<warps::Layout<1>>(job, warps::kernel<1>, stream)
                       : launch_shape<warps::Layout<2>>(job, warps::kernel<2>, stream);
}

}  // namespace fd_dsa::narrow

extern "C" int fd_dsa_sparse_mla_narrow_cuda(const FdDsaSparseMla* job, void* stream) {
  return fd_dsa::narrow::launch_narrow(*job, stream);
}

// Returns the size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_sparse_mla_bytes() { return static_cast<int>(sizeof(FdDsaSparseMla)); }
