// Sparse MLA for many heads: what a block holds in shared memory, and what its threads share.
#ifndef FD_DSA_SPARSE_MLA_WIDE_SHARED_CUH
#define FD_DSA_SPARSE_MLA_WIDE_SHARED_CUH

#include "hopper.cuh"
#include "sparse_mla.h"
#include "sparse_mla_values.cuh"
#include "wgmma_wide.cuh"

namespace fd_dsa::wide {

using namespace hopper;

constexpr int kRank = 512, kWidth = 576;
constexpr int kRecord = 656, kScalesAt = 512, kRopeAt = 528;
constexpr int kHeads = 64, kKeys = 64;  // of a block, of a tile
constexpr int kThreads = 384;  // two warpgroups that compute, one that brings tiles

// An operand is nine blocks of 64 columns, 64 rows each, swizzled; the ninth holds what is roped.
constexpr uint32_t kBlock = 64 * 128, kOperand = 9 * kBlock, kRopeBlock = 8 * kBlock;
// Floats from a head's partial result to the next one's: neighbours in other banks.
constexpr int kPartStride = kRank + 8;

// Where things lie in shared memory, in bytes.
constexpr uint32_t kQuery = 0, kTiles = kOperand, kFactors = 3 * kOperand;
constexpr uint32_t kTops = kFactors + 4 * kHeads;          // of either warpgroup
constexpr uint32_t kTotals = kTops + 2 * 4 * kHeads;       // of either warpgroup
constexpr uint32_t kShares = kTotals + 2 * 4 * kHeads;     // of the blocks of a cluster
constexpr uint32_t kSeen = kShares + 4 * kHeads;           // 64 bits a tile
constexpr uint32_t kLast = kSeen + 2 * 8;                  // of four warps
constexpr uint32_t kPlace = kLast + 4 * 4;
constexpr uint32_t kBarriers = kPlace + 4 * 4;
constexpr uint32_t kBytes = kBarriers + 8 * 8;
static_assert(kBytes <= 232448 && kHeads * kPartStride * 4 <= 2 * kOperand);

// Tile t lies in buffer t % 2. Each half of its latents has a barrier for "there" and one for
// "free": half g is summed up, and freed, by warpgroup g.
__device__ __forceinline__ uint32_t tile_at(uint32_t base, int buffer) {
  return base + kTiles + buffer * kOperand;
}
__device__ __forceinline__ uint32_t there(uint32_t base, int buffer, int half) {
  return base + kBarriers + (buffer * 2 + half) * 8;
}
__device__ __forceinline__ uint32_t is_free(uint32_t base, int buffer, int half) {
  return there(base, buffer, half) + 32;
}
// What is roped comes with half 1, which is brought after half 0: both are free then. Once a tile
// is scored, its weights lie in the roped block, where both warpgroups read them.

// Numbers of named barriers.
enum {
  kStart = 1,
  kScored,
  kFirstWeights,
  kSecondWeights,
  kOfFirst,
  kOfSecond,
  kOfCopiers,
  kOfComputing
};

// Blocks of 64 heads of a token; what is missing of the last is padding.
__host__ __device__ __forceinline__ int groups_of(const FdDsaSparseMla& job) {
  return (job.num_heads + kHeads - 1) / kHeads;
}

// The entries of a row that a block looks at.
struct Entries {
  const int32_t* slots;
  int count;
};

__device__ __forceinline__ Entries entries_of(const FdDsaSparseMla& job, int64_t token,
                                              int split, int splits) {
  const int tiles = (job.topk + kKeys - 1) / kKeys;
  const int each = (tiles + splits - 1) / splits * kKeys;
  const int begin = min(split * each, job.topk);
  return {job.slots + token * job.topk + begin, min(each, job.topk - begin)};
}

}  // namespace fd_dsa::wide

#endif  // FD_DSA_SPARSE_MLA_WIDE_SHARED_CUH
