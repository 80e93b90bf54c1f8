// Sparse MLA for few heads: records, tiles, and where things lie in shared memory.
#ifndef FD_DSA_SPARSE_MLA_NARROW_LAYOUT_CUH
#define FD_DSA_SPARSE_MLA_NARROW_LAYOUT_CUH

#include "hopper.cuh"
#include "sparse_mla.h"

namespace fd_dsa::narrow {

using namespace hopper;

constexpr int kRank = 512, kWidth = 576, kRecord = 656;
constexpr int kScalesAt = 512, kRopeAt = 528;
constexpr int kTile = 64;  // keys
constexpr int kSixteens = kTile / 16;
constexpr int kTileBytes = kTile * kRecord;
constexpr int kCopyWarps = 4;
// Strides in floats, such that threads of a warp are in different banks.
constexpr int kSumStride = kTile + 4, kWeightStride = kTile + 16, kPartStride = kRank + 4;

// Numbers of named barriers: of each warpgroup that computes, and of both.
enum { kOfFirst = 1, kOfSecond, kOfBoth, kOfBothNext };

// How a block is made of warpgroups that compute.
enum class Form {
  kOne,        // one; two blocks on a multiprocessor
  kTakeTurns,  // two, each with every other tile
  kWarpgroups  // two, each with every other tile, whose warps make products together
};

// Where things lie in shared memory, in bytes.
template <int kHeads, Form kForm>
struct Layout {
  static constexpr int kGroups = kForm == Form::kOne ? 1 : 2;
  static constexpr int kStages = 2 * kGroups;
  // warpgroups whose results add up
  static constexpr int kParts = kForm == Form::kTakeTurns ? 2 : 1;
  static constexpr int kRing = 0;
  static constexpr int kSums = kRing + kStages * kTileBytes;
  static constexpr int kSumBytes = 4 * kHeads * kSumStride * 4;
  static constexpr int kWeights = kSums + kGroups * kSumBytes;
  static constexpr int kWeightBytes = kHeads * kWeightStride * 4;
  static constexpr int kShrinks = kWeights + kGroups * kWeightBytes;
  static constexpr int kStats = kShrinks + kGroups * kHeads * 4;
  static constexpr int kMasks = kStats + kGroups * kHeads * 8;
  static constexpr int kBarriers = kMasks + kStages * 8;
  static constexpr int kBytes = kBarriers + kStages * 16;
  static constexpr int kThreads = (kGroups * 4 + kCopyWarps) * 32;
  static constexpr int kBlocksPerSm = kGroups == 1 ? 2 : 1;
  // registers of a thread that computes, and of one that copies
  static constexpr int kMany = kGroups == 1 ? 216 : 232, kFew = 40;
  static constexpr int kPartBytes = kStages / kGroups * kTileBytes;
  static_assert(kHeads * kPartStride * 4 <= kPartBytes);

  // a stage is always the same warpgroup's, and one barrier tells of its tiles
  static constexpr int kFulls = 1;
  static __device__ __forceinline__ uint32_t full(uint32_t base, uint32_t stage, int = 0) {
    return base + kBarriers + stage * 16;
  }
  static __device__ __forceinline__ uint32_t empty(uint32_t base, uint32_t stage) {
    return full(base, stage) + 8;
  }
};

template <int kHeads>
struct Layout<kHeads, Form::kWarpgroups> {
  static constexpr int kGroups = 2, kParts = 1;
  static constexpr int kStages = kHeads > 16 ? 3 : 4;
  // tiles of a warpgroup from one in a stage to its next one there
  static constexpr int kVisits = kStages % 2 == 0 ? kStages / 2 : kStages;
  // 64 columns of an operand
  static constexpr int kOperand = kHeads * 128;
  static constexpr int kRing = 0;
  static constexpr int kQueries = kRing + kStages * kTileBytes;
  static constexpr int kWeights = kQueries + 9 * kOperand;
  // for each 128 latents, with their scales in them
  static constexpr int kWeightBytes = 4 * kOperand;
  static constexpr int kSums = kWeights + kGroups * kWeightBytes;
  static constexpr int kSumBytes = kHeads * kSumStride * 4;
  static constexpr int kFactors = kSums + kGroups * kSumBytes;
  static constexpr int kTops = kFactors + kHeads * 4;
  static constexpr int kShrinks = kTops + kGroups * kHeads * 4;
  static constexpr int kMoved = kShrinks + kGroups * kHeads * 4;
  static constexpr int kOwnStats = kMoved + kGroups * 16;
  static constexpr int kStats = kOwnStats + kGroups * kHeads * 8;
  static constexpr int kMasks = kStats + kHeads * 8;
  static constexpr int kBarriers = kMasks + kStages * 8;
  static constexpr int kBytes = kBarriers + kStages * 24;
  static constexpr int kThreads = (kGroups * 4 + kCopyWarps) * 32;
  static constexpr int kMany = 240, kFew = 24;
  // After the last tile: a block's part for its cluster, in the ring; and what warpgroups tell each
  // other, beside it.
  static constexpr int kPartBytes = kHeads * kPartStride * 4, kExchange = kQueries;
  static_assert(kPartBytes <= kExchange && kExchange + kHeads * kRank * 4 <= kSums);
  static_assert(kBytes <= 232448);
  static_assert(kQueries % 1024 == 0 && kWeights % 1024 == 0);

  // One for each warpgroup, which waits for its own tiles alone: of a barrier whose every phase it
  // does not wait for, it could take an earlier one for its own.
  static constexpr int kFulls = 2;
  static __device__ __forceinline__ uint32_t full(uint32_t base, uint32_t stage, int group) {
    return base + kBarriers + stage * 24 + group * 8;
  }
  static __device__ __forceinline__ uint32_t empty(uint32_t base, uint32_t stage) {
    return full(base, stage, 2);
  }
};

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_LAYOUT_CUH
