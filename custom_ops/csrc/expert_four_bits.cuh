// What both kernels for experts in four bits share: how they read lists of pairs, and their launch.
#pragma once

#include "expert_result.cuh"

namespace fd_dsa::experts {

// values of a stage along K
constexpr int kPiece = 128;
// threads of a block: two warpgroups multiply, and one copies
constexpr int kThreads = 384;
// From this average of pairs of an expert on, a counter in memory gives tiles to blocks.
constexpr int kManyPairs = 64;

template <typename Job>
inline int mean_pairs(const Job& job) {
  return job.num_pairs / job.num_experts;
}

// Returns true if sizes, lists and addresses are such that a tile has `columns` columns of the
// result, and 16 bytes of an activation's row have `chunk` values.
template <typename Job>
inline bool has_valid_tiles(const Job& job, int columns, int chunk) {
  return job.width > 0 && job.width % kPiece == 0 && job.columns % columns == 0 &&
         job.num_experts > 0 && job.num_experts <= kMaxExperts && job.row_pairs > 0 &&
         (job.taken != nullptr || mean_pairs(job) < kManyPairs) &&
         job.num_rows * job.row_pairs == job.num_pairs &&
         // 32-bit numbers count the chunks of activations, and divide pairs
         job.num_rows * (job.width / chunk) < 1ll << 32 &&
         static_cast<int64_t>(job.num_pairs) * job.row_pairs < 1ll << 32 && is_aligned(job.x) &&
         is_aligned(job.weight) && is_aligned(job.weight_scales) && is_aligned(job.out);
}

// Launches blocks that take tiles of up to `rows` pairs. `bytes` of shared memory and `together`
// blocks are on a multiprocessor. A launch without the counter `taken` may begin early.
template <typename Job>
inline int launch_tiles(void (*kernel)(Job, uint32_t), const Job& job, int rows, int groups,
                        int bytes, int together, uint32_t* taken, void* stream,
                        std::atomic<uint64_t>& prepared) {
  uint32_t blocks = 0;
  const cudaError_t error =
      prepare_tiles(kernel, job, rows, groups, bytes, together, taken, stream, prepared, blocks);
  if (error != cudaSuccess) return static_cast<int>(error);
  auto config = launch_config(blocks, kThreads, stream, bytes);
  LaunchAttributes attributes;
  if (taken == nullptr && job.starts_early != 0) start_early(config, attributes);
  return launch(config, kernel, job, blocks);
}

#if defined(FD_DSA_HOPPER)

// Rows of activations of a tile's pairs.
struct TileRows {
  const int32_t* pairs;
  int count;
  uint32_t row_pairs, inverse;

  // A division takes many instructions, so there is one for a tile.
  template <typename Job>
  __device__ __forceinline__ TileRows(const Job& job, const Tile& tile)
      : pairs(pairs_of(job, tile)),
        count(tile.left),
        row_pairs(job.row_pairs),
        inverse(0xffffffffu / job.row_pairs + 1) {}

  // Returns the row of the tile's pair `at`, or row 0 past the last pair.
  __device__ __forceinline__ uint32_t row(int at) const {
    const uint32_t pair = at < count ? __ldg(pairs + at) : 0;
    // exact up to 2^32 / row_pairs
    return row_pairs == 1 ? pair : __umulhi(pair, inverse);
  }
};

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::experts
