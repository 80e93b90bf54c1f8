// Experts in NVFP4 or INT4: tiles, and the warpgroup that copies operands to shared memory.
#pragma once

#include "expert_gemm_w4a16.h"
#include "expert_four_bits.cuh"
#include "wgmma.cuh"

namespace fd_dsa::experts_w4a16 {

using namespace hopper;
using namespace experts;
using Job = FdDsaExpertGemmW4a16;

constexpr int kPairs = 128, kColumns = 256, kHalfColumns = kColumns / 2;
constexpr int kStages = 4;
// registers of a thread that multiplies and of one that copies, of 168 at the start
[[maybe_unused]] constexpr int kComputeRegisters = 224, kCopyRegisters = 56;

// Offsets in shared memory, in bytes. The activations of a stage are two operands of 64 values: rows
// of 128 bytes, swizzled. Scales of integers fill half of their space.
constexpr uint32_t kOperand = kPairs * 128, kActivations = 2 * kOperand;
constexpr uint32_t kColumnCodes = kPiece / 2, kCodes = kColumns * kColumnCodes;
constexpr uint32_t kScales = kColumns * 8;
constexpr uint32_t kAllCodes = kStages * kActivations, kAllScales = kAllCodes + kStages * kCodes;
constexpr uint32_t kLines = kAllScales + kStages * kScales;
constexpr uint32_t kLinesBytes = 2 * kChunkBytes;  // of a warpgroup
constexpr uint32_t kOwnTiles = kLines + 2 * kLinesBytes, kEnds = kOwnTiles + kStages * 16;
constexpr uint32_t kNext = kEnds + 4 * kMaxExperts, kBarriers = kNext + 2 * 4;
constexpr uint32_t kBytes = kBarriers + 2 * kStages * 8;
static_assert(kBytes <= 232448 && kLines % 16 == 0 && kOwnTiles % 16 == 0 && kNext % 8 == 0);

// Named barriers: the result rows of the first warpgroup. Those of the second one have the next
// number.
enum { kLinesBarrier = kFirstOwnBarrier };

__host__ __device__ __forceinline__ int column_groups(const Job& job) {
  return job.columns / (job.is_gated != 0 ? kHalfColumns : kColumns);
}

#if defined(FD_DSA_HOPPER)

struct Turn : StageTurn<kStages, kBarriers> {
  __device__ __forceinline__ uint32_t activations() const { return base + stage * kActivations; }
  __device__ __forceinline__ uint32_t codes() const { return base + kAllCodes + stage * kCodes; }
  __device__ __forceinline__ uint32_t scales() const { return base + kAllScales + stage * kScales; }
  __device__ __forceinline__ uint32_t own_tile() const { return base + kOwnTiles + stage * 16; }
};

// Copies all stages of a tile. Thread t copies chunk t % 16 of rows t / 16 + 8 i.
template <bool kGated, bool kInteger>
__device__ __forceinline__ void copy_stages(const Job& job, const Tile& tile, int thread,
                                            Turn& turn) {
  constexpr int kRowsPerThread = kPairs / 8, kParts = kGated ? 2 : 1;
  constexpr uint32_t kColumnScales = kInteger ? 4 : 8;
  const int pieces = job.width / kPiece, count = tile.left;
  const int tile_columns = tile.group * (kGated ? kHalfColumns : kColumns);
  // starts the copies of a stage's weights when it is free
  const auto copy_weights = [&](int piece) {
    const uint32_t full = turn.is_full();
    barrier_wait(turn.is_free(), turn.parity ^ 1);
    if (thread != 0) return;
    store_tile(turn.own_tile(), tile);
    barrier_arrive_expecting(full, kCodes + kColumns * kColumnScales);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = tile_columns + (kGated ? 0 : half * kHalfColumns);
      const int64_t matrix = tile.expert * kParts + (kGated ? half : 0);
      const int64_t column = (matrix * pieces + piece) * job.columns + first;
      copy_bulk(turn.codes() + half * (kCodes / 2),
                static_cast<const char*>(job.weight) + column * kColumnCodes, kCodes / 2, full);
      copy_bulk(turn.scales() + half * (kHalfColumns * kColumnScales),
                static_cast<const char*>(job.weight_scales) + column * kColumnScales,
                kHalfColumns * kColumnScales, full);
    }
  };
  // before the list of pairs is known
  copy_weights(0);
  const TileRows rows(job, tile);
  uint32_t chunks[kRowsPerThread];  // from the beginning of the activations
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    chunks[i] = rows.row(thread / 16 + i * 8) * (job.width / 8);
  }
  const uint32_t to = thread % 16 / 8 * kOperand + swizzled(thread / 16, thread % 8);
  const char* x = static_cast<const char*>(job.x) + thread % 16 * 16;
  for (int piece = 0; piece < pieces; ++piece, turn.advance()) {
    if (piece > 0) copy_weights(piece);
    const uint32_t activations = turn.activations() + to;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      // the swizzle repeats after 8 rows
      if (i * 8 < count) {
        copy_16(activations + i * 8 * 128, x + static_cast<uint64_t>(chunks[i]) * 16,
                thread / 16 + i * 8 < count);
      }
    }
    barrier_arrive_after_copies(turn.is_full());
    x += kPiece * 2;
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::experts_w4a16
