// Experts in MXFP4: tiles, codes, and the warpgroup that copies both to shared memory.
#pragma once

#include "expert_gemm_fp4.h"
#include "expert_four_bits.cuh"
#include "wgmma.cuh"

namespace fd_dsa::experts_fp4 {

using namespace hopper;
using namespace experts;
using Job = FdDsaExpertGemmFp4;

constexpr int kColumns = 128, kHalfColumns = kColumns / 2;
// exponent of 2 of the factors that FourBitWeight has
[[maybe_unused]] constexpr float kFactor = 1.0f / (1 << 26);
// The code of a value with the largest scale is that of 2^13 times the value: up to 49,152 of 57,344.
[[maybe_unused]] constexpr int kRaised = 13;
// e5m2 codes of the sizes of e2m1 with the largest scale, and what each byte but that of zero lacks
// with half the scale
[[maybe_unused]] constexpr uint32_t kLowSizes = 0x72706c00u, kHighSizes = 0x7a787674u;
[[maybe_unused]] constexpr uint32_t kLowStep = 0x04040400u, kHighStep = 0x04040404u;

// Four-bit codes and scales of a stage's columns, and peaks of a tile's columns.
constexpr uint32_t kCodes = kColumns * kPiece / 2, kScales = kColumns * 4, kPeaks = kColumns;

// Tiles of up to `kPairs` pairs, and their offsets in shared memory in bytes.
//
// Two blocks share a multiprocessor, unless a tile has so many pairs that their sums fill its
// registers. A tile of 16 pairs leaves room for more stages. The activations of a stage are rows of
// 128 bytes, swizzled.
template <int kPairs>
struct Form {
  static constexpr bool kMany = kPairs > 64;
  static constexpr int kBlocks = kMany ? 1 : 2, kStages = kPairs <= 16 ? 9 : 5;
  // registers of a thread that multiplies and of one that copies, of 168 or 80 at the start
  static constexpr int kComputeRegisters = kMany ? 224 : 96, kCopyRegisters = kMany ? 56 : 48;
  static_assert(2 * kComputeRegisters + kCopyRegisters == 3 * (kMany ? 168 : 80));
  // buffers of result rows of a warpgroup
  static constexpr int kBuffers = kPairs <= kChunk ? 1 : 2;
  // scales that a pair may have in a stage
  static constexpr int kMostScales = kPairs <= 16 ? 2 : 1;

  static constexpr uint32_t kActivations = kPairs * kPiece, kPairScales = kPairs * kMostScales * 4;
  static constexpr uint32_t kAllCodes = kStages * kActivations;
  static constexpr uint32_t kAllScales = kAllCodes + kStages * kCodes;
  static constexpr uint32_t kAllPairScales = kAllScales + kStages * kScales;
  static constexpr uint32_t kLines = kAllPairScales + kStages * kPairScales;
  // each stage's tile and peaks
  static constexpr uint32_t kLinesBytes = kBuffers * kChunkBytes;  // of a warpgroup
  static constexpr uint32_t kOwnTiles = kLines + 2 * kLinesBytes;
  static constexpr uint32_t kAllPeaks = kOwnTiles + kStages * 16;
  static constexpr uint32_t kEnds = kAllPeaks + kStages * kPeaks;
  static constexpr uint32_t kNext = (kEnds + 4 * kMaxExperts + 7) / 8 * 8;
  static constexpr uint32_t kBarriers = kNext + 2 * 4, kBytes = kBarriers + 2 * kStages * 8;
  // a block has at most 227 KiB, and the device keeps 1 KiB of each block
  static_assert(kBlocks * (kBytes + 1024) <= 228 * 1024 && kLines % 16 == 0 && kOwnTiles % 16 == 0);
};

// Named barriers: the turns of each warpgroup, what both find in results, and the result rows of the
// first one. Those of the second one have the next number.
enum { kFirstBarrier = kFirstOwnBarrier, kSecondBarrier, kBothBarrier, kLinesBarrier };

__host__ __device__ __forceinline__ int column_groups(const Job& job) {
  return job.columns / (job.is_gated != 0 ? kHalfColumns : kColumns);
}

#if defined(FD_DSA_HOPPER)

template <int kPairs>
struct Turn : StageTurn<Form<kPairs>::kStages, Form<kPairs>::kBarriers> {
  using F = Form<kPairs>;
  using Base = StageTurn<F::kStages, F::kBarriers>;
  using Base::base, Base::stage;

  __device__ __forceinline__ uint32_t activations() const { return base + stage * F::kActivations; }
  __device__ __forceinline__ uint32_t codes() const { return base + F::kAllCodes + stage * kCodes; }
  __device__ __forceinline__ uint32_t scales() const {
    return base + F::kAllScales + stage * kScales;
  }
  __device__ __forceinline__ uint32_t pair_scales() const {
    return base + F::kAllPairScales + stage * F::kPairScales;
  }
  __device__ __forceinline__ uint32_t own_tile() const { return base + F::kOwnTiles + stage * 16; }
  __device__ __forceinline__ uint32_t peaks() const { return base + F::kAllPeaks + stage * kPeaks; }
};

// Sets the e5m2 codes of a word: `low` of its lower half, `high` of its upper half.
//
// Code i of the lower half has its size at bit 4 i and its sign at bit 8 i + 7. That of the upper half
// has them at bits 4 i + 16 and 8 i + 3.
//
// Args:
//   sizes: e5m2 codes of the eight sizes with the word's scale.
__device__ __forceinline__ void turn_codes(uint32_t word, uint2 sizes, uint32_t& low,
                                           uint32_t& high) {
  const uint32_t selectors = word & 0x77777777u;
  low = __byte_perm(sizes.x, sizes.y, selectors) | (word & 0x80808080u);
  high = __byte_perm(sizes.x, sizes.y, selectors >> 16) | (word << 4 & 0x80808080u);
}

// Copies all stages of a tile. Thread t copies chunk t % 8 of rows t / 8 + 16 i, and the scales of
// rows t and t + 128. The first stage has the peaks of the columns, too.
//
// A pair has kScaleParts scales in a stage. With `is_early` the launch before may still write `x`:
// the weights of all stages are copied first, and the wait for that launch comes after them.
template <bool kGated, int kScaleParts, int kPairs>
__device__ __forceinline__ void copy_stages(const Job& job, const Tile& tile, int thread,
                                            bool is_early, Turn<kPairs>& turn) {
  constexpr int kAllScales = kPairs * kScaleParts;
  constexpr int kRowsPerThread = kPairs / 16, kScalesPerThread = (kAllScales + 127) / 128;
  constexpr int kParts = kGated ? 2 : 1;
  const int pieces = job.width / kPiece, count = tile.left;
  const int tile_columns = tile.group * (kGated ? kHalfColumns : kColumns);
  // starts the copies of a stage's weights when it is free
  const auto copy_weights = [&](const Turn<kPairs>& turn, int piece) {
    const uint32_t full = turn.is_full();
    barrier_wait(turn.is_free(), turn.parity ^ 1);
    if (thread != 0) return;
    store_tile(turn.own_tile(), tile);
    barrier_arrive_expecting(full, kCodes + kScales + (piece == 0 ? kPeaks : 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = tile_columns + (kGated ? 0 : half * kHalfColumns);
      const int64_t matrix = tile.expert * kParts + (kGated ? half : 0);
      const int64_t column = (matrix * pieces + piece) * job.columns + first;
      copy_bulk(turn.codes() + half * (kCodes / 2),
                static_cast<const char*>(job.weight) + column * (kPiece / 2), kCodes / 2, full);
      copy_bulk(turn.scales() + half * (kScales / 2),
                static_cast<const char*>(job.weight_scales) + column * 4, kScales / 2, full);
      if (piece == 0) {
        copy_bulk(turn.peaks() + half * (kPeaks / 2),
                  static_cast<const char*>(job.peaks) + matrix * job.columns + first, kPeaks / 2,
                  full);
      }
    }
  };
  // before the list of pairs is known
  copy_weights(turn, 0);
  int copied = 1;  // pieces whose weights are copied
  if (is_early) {
    Turn<kPairs> ahead = turn;
    for (const int stages = min(pieces, Form<kPairs>::kStages); copied < stages; ++copied) {
      ahead.advance();
      copy_weights(ahead, copied);
    }
    wait_for_inputs();
    start_next();
  }
  const TileRows rows(job, tile);
  // chunks from the beginning of the codes
  uint32_t chunks[kRowsPerThread], scale_rows[kScalesPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    chunks[i] = rows.row(thread / 8 + i * 16) * (job.width / 16);
  }
#pragma unroll
  for (int i = 0; i < kScalesPerThread; ++i) {
    const int at = thread + i * 128;
    scale_rows[i] = rows.row(kScaleParts > 1 ? at % kPairs : at);
  }
  const uint32_t to = swizzled(thread / 8, thread % 8);
  const char* x = static_cast<const char*>(job.x) + thread % 8 * 16;
  const float* scales = job.x_scales;
  if (kScaleParts > 1 && thread >= kPairs) scales += job.x_stride;
  for (int piece = 0; piece < pieces; ++piece, turn.advance()) {
    if (piece >= copied) copy_weights(turn, piece);
    const uint32_t activations = turn.activations() + to;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      // the swizzle repeats after 16 rows
      if (i * 16 < count) {
        copy_16(activations + i * 16 * kPiece, x + static_cast<uint64_t>(chunks[i]) * 16,
                thread / 8 + i * 16 < count);
      }
    }
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int at = thread + i * 128, pair = kScaleParts > 1 ? at % kPairs : at;
      if (at < kAllScales) {
        copy_few<4>(turn.pair_scales() + at * 4, scales + scale_rows[i], pair < count);
      }
    }
    barrier_arrive_after_copies(turn.is_full());
    x += kPiece;
    scales += kScaleParts * job.x_stride;
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::experts_fp4
