// The launcher of sparse MLA for 1 to 32 heads: which kernel, and among how many blocks.
#include <algorithm>

#include "sparse_mla_launch.cuh"
#include "sparse_mla_narrow_warpgroups.cuh"
#include "sparse_mla_narrow_warps.cuh"

namespace fd_dsa::narrow {

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

inline int launch_narrow(const FdDsaSparseMla& job, void* stream) {
  if (job.num_tokens <= 0 || job.num_heads <= 0) return 0;
  if (job.num_heads > 32 || job.is_fp8 == 0 || job.splits < 0 || job.splits > kMostSplits) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  if (job.num_heads > 16) return launch_shape<warpgroups::Layout<32>>(job, warpgroups::kernel<32>, stream);
  if (job.num_heads > 8) return launch_shape<warpgroups::Layout<16>>(job, warpgroups::kernel<16>, stream);
  // two blocks on a multiprocessor: where there are tokens for them, and where a block has next to
  // nothing to do
  constexpr int32_t kMany = 132;
  const bool is_one = job.num_tokens > kMany || job.num_tokens <= kFewTokens;
  return is_one ? launch_shape<warps::Layout<1>>(job, warps::kernel<1>, stream)
                : launch_shape<warps::Layout<2>>(job, warps::kernel<2>, stream);
}

}  // namespace fd_dsa::narrow

extern "C" int fd_dsa_sparse_mla_narrow_cuda(const FdDsaSparseMla* job, void* stream) {
  return fd_dsa::narrow::launch_narrow(*job, stream);
}

// Size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_sparse_mla_bytes() { return static_cast<int>(sizeof(FdDsaSparseMla)); }
