// The grouped GEMM of routed experts in MXFP4 by activations in FP8.
//
// A tile is up to 16, 64 or 240 pairs of an expert by 128 columns. A gated tile has 64 columns of the
// gate and the 64 that they multiply. With few pairs two blocks share a multiprocessor, and their time
// is that of reading the weights. A pair's sums do not depend on the size of its tile.
//
// One warpgroup copies operands, 128 values along K at a time, several such stages ahead. Two
// warpgroups multiply, 64 columns each. Columns are the rows of the tensor cores' result, so a
// thread turns four-bit codes into e5m2 codes in its registers, and the tensor cores read them
// there. A code that is turned once meets all pairs of the tile, a third of them at a time.
//
// A group of 32 values has a scale, a power of two. The largest scale of a column multiplies its
// sums at the end, and the exponents of the codes are smaller by what their own scales lack. That is
// exact, as loaded scales are at most 2^26 apart (FourBitWeight of fd_dsa/tensor.py).
//
// A stage's codes of a column are 16 words. A lane has four of them, one of each group, in the order
// in which the tensor cores read its codes. The sizes of a word's codes are selectors of `prmt`, which
// looks up four codes in eight bytes. These bytes are the codes of the eight sizes of e2m1, and differ
// between scales by the same number each.
//
// With up to 16 pairs the rows between both GEMMs can be in FP8, with a scale for each 64 values. Those
// are the columns of a tile of the first GEMM, which writes codes, so no launch has to quantise them.
// The second GEMM then has sums of its own for each half of a stage.
//
// In tiles of 240 pairs the warpgroups take turns at turning codes, so that the tensor cores multiply
// for the other one meanwhile. With up to 16 pairs a warpgroup turns the codes of a stage during its
// own GEMM of the stage before.
//
// Sources: OCP Microscaling Formats 1.0 for the formats; PTX ISA 8.5 for `prmt` and for the operands
// of wgmma; FlashAttention-3 (arXiv 2407.08608) section 3.1 for warpgroups that take turns.
#include "expert_gemm_fp4.h"

#include "expert_tiles.cuh"
#include "wgmma.cuh"

namespace fd_dsa::experts_fp4 {

using namespace hopper;
using namespace experts;
using Job = FdDsaExpertGemmFp4;

constexpr int kPiece = 128;  // values of a stage along K
constexpr int kColumns = 128, kHalfColumns = kColumns / 2;
constexpr int kThreads = 384;
// exponent of 2 of the factors that FourBitWeight has
[[maybe_unused]] constexpr float kFactor = 1.0f / (1 << 26);
// The code of a value with the largest scale is that of 2^13 times the value: up to 49,152 of 57,344.
[[maybe_unused]] constexpr int kRaised = 13;
// e5m2 codes of the sizes of e2m1 with the largest scale, and what each byte but that of zero lacks
// with half the scale
[[maybe_unused]] constexpr uint32_t kLowSizes = 0x72706c00u, kHighSizes = 0x7a787674u;
[[maybe_unused]] constexpr uint32_t kLowStep = 0x04040400u, kHighStep = 0x04040404u;

// 32 result rows of a warpgroup in shared memory, 128 bytes each. Another 16 bytes put neighbours in
// different banks.
constexpr int kChunk = 32;
constexpr uint32_t kLine = 128 + 16, kChunkBytes = kChunk * kLine;
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

template <int kPairs>
__device__ __forceinline__ bool find(const Job& job, uint32_t base, uint32_t number, Tile& tile) {
  const uint32_t ends = base + Form<kPairs>::kEnds;
  if (!find_tile<kPairs>(job, column_groups(job), ends, number, tile)) return false;
  // an expert's tiles have about as many pairs each
  const int count = tile.first + tile.left, tiles = (count + kPairs - 1) / kPairs;
  const int rows = (count + tiles - 1) / tiles;
  tile.first = tile.first / kPairs * rows;
  tile.left = min(count - tile.first, rows);
  return true;
}

// Stores a tile. Its first word is the expert, or kNoTile.
__device__ __forceinline__ void store_tile(uint32_t at, const Tile& tile) {
  store_shared(at, make_uint4(tile.expert, tile.first, tile.left, tile.group));
}

__device__ __forceinline__ Tile load_tile(uint32_t at) {
  const uint4 x = load_shared_uint4(at);
  return {static_cast<int>(x.x), static_cast<int>(x.y), static_cast<int>(x.z),
          static_cast<int>(x.w)};
}

// ---- the warpgroup that copies operands

// Copies all stages of a tile. Thread t copies chunk t % 8 of rows t / 8 + 16 i, and the scales of
// rows t and t + 128. The first stage has the peaks of the columns, too.
//
// A pair has kScaleParts scales in a stage.
template <bool kGated, int kScaleParts, int kPairs>
__device__ __forceinline__ void copy_stages(const Job& job, const Tile& tile, int thread,
                                            Turn<kPairs>& turn) {
  constexpr int kAllScales = kPairs * kScaleParts;
  constexpr int kRowsPerThread = kPairs / 16, kScalesPerThread = (kAllScales + 127) / 128;
  constexpr int kParts = kGated ? 2 : 1;
  const int pieces = job.width / kPiece, count = tile.left;
  const int tile_columns = tile.group * (kGated ? kHalfColumns : kColumns);
  // starts the copies of a stage's weights when it is free
  const auto copy_weights = [&](int piece) {
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
  copy_weights(0);
  const int32_t* pairs = pairs_of(job, tile);
  // chunks from the beginning of the codes
  uint32_t chunks[kRowsPerThread], scale_rows[kScalesPerThread];
  // a division takes many instructions
  const uint32_t inverse = 0xffffffffu / job.row_pairs + 1;
  const auto row_at = [&](int at) -> uint32_t {
    const uint32_t pair = at < count ? __ldg(pairs + at) : 0;
    // exact up to 2^32 / row_pairs
    return job.row_pairs == 1 ? pair : __umulhi(pair, inverse);
  };
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    chunks[i] = row_at(thread / 8 + i * 16) * (job.width / 16);
  }
#pragma unroll
  for (int i = 0; i < kScalesPerThread; ++i) {
    const int at = thread + i * 128;
    scale_rows[i] = row_at(kScaleParts > 1 ? at % kPairs : at);
  }
  const uint32_t to = swizzled(thread / 8, thread % 8);
  const char* x = static_cast<const char*>(job.x) + thread % 8 * 16;
  const float* scales = job.x_scales;
  if (kScaleParts > 1 && thread >= kPairs) scales += job.x_stride;
  for (int piece = 0; piece < pieces; ++piece, turn.advance()) {
    if (piece > 0) copy_weights(piece);
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

// ---- the warpgroups that multiply

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

// Warpgroup 0 or 1 with its 64 columns of each tile.
//
// A thread has two columns, 8 rows of the tensor cores' result apart, and two neighbouring pairs of
// each 8. Value j * 4 + r * 2 + p is that of column r and of pair 8 j + lane % 4 * 2 + p.
template <bool kGated, int kPairs, bool kInFp8>
struct Multiplier {
  using F = Form<kPairs>;
  static constexpr bool kMany = F::kMany;
  // parts of a stage whose scales differ
  static constexpr int kScaleParts = kInFp8 && !kGated ? 2 : 1;
  // columns of a warp in a stage, those of a row of a warpgroup's results, and from a thread's first
  // column to its second one
  static constexpr int kWarpColumns = kGated ? 8 : 16, kRowColumns = 4 * kWarpColumns;
  static constexpr int kNextColumn = kGated ? kHalfColumns : 8;

  const Job& job;
  uint32_t base;
  int warp, lane;  // index of the warp among both warpgroups
  int column;      // first column of this thread in a stage
  int own_barrier;
  Turn<kPairs> turn;
  bool is_odd = false;  // number of the tile whose results are rounded

  __device__ __forceinline__ Multiplier(const Job& job, uint32_t base, int warp, int lane)
      : job(job), base(base), warp(warp), lane(lane), turn{{base}} {
    column = warp * kWarpColumns + lane / 4;
    own_barrier = warp < 4 ? kFirstBarrier : kSecondBarrier;
    // the first warpgroup has the first turn
    if (kMany && own_barrier == kSecondBarrier) named_barrier_arrive(kFirstBarrier, 256);
  }

  // Loads the largest scales of this thread's columns, and computes `zeros` of `read_codes`.
  __device__ __forceinline__ void read_peaks(uint32_t (&peaks)[2], uint2 (&zeros)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peaks[r] = load_shared_byte(turn.peaks() + column + r * kNextColumn);
      zeros[r] = {kLowSizes - peaks[r] * kLowStep, kHighSizes - peaks[r] * kHighStep};
    }
  }

  // Turns the codes of a stage, for four steps of wgmma.
  //
  // Args:
  //   zeros: e5m2 codes of the eight sizes of each column, as they would be with a scale code of 0.
  __device__ __forceinline__ void read_codes(const uint2 (&zeros)[2],
                                             uint32_t (&codes)[4][4]) const {
    uint4 words[2];
    uint32_t scales[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = column + r * kNextColumn;
      words[r] = load_shared_uint4(turn.codes() + own * (kPiece / 2) + lane % 4 * 16);
      scales[r] = load_shared(turn.scales() + own * 4);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t own[4] = {words[r].x, words[r].y, words[r].z, words[r].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t scale = __byte_perm(scales[r], 0, 0x4440 + i);
        const uint2 sizes = {zeros[r].x + scale * kLowStep, zeros[r].y + scale * kHighStep};
        turn_codes(own[i], sizes, codes[i][r], codes[i][2 + r]);
      }
    }
  }

  // Starts the GEMM of a third of kCount pairs over each part of a stage.
  template <int kCount>
  __device__ __forceinline__ void multiply(float (&parts)[kScaleParts][kCount / 2],
                                           const uint32_t (&codes)[4][4], int third) const {
    constexpr int kSteps = 4 / kScaleParts;
    const Operand pairs = k_major(turn.activations() + third * (kCount * kPiece));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma_code_rows<kCount>(parts[i / kSteps], codes[i], pairs.at(i * 32), i % kSteps > 0);
    }
    wgmma_commit();
  }

  // Loads the scales of this thread's pairs of kCount pairs.
  //
  // Args:
  //   from: shared address of the first pair's scale
  template <int kCount>
  __device__ __forceinline__ void read_scales(float2 (&scales)[kCount / 8], uint32_t from) const {
    from += lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < kCount / 8; ++j) scales[j] = load_shared_float2(from + j * 32);
  }

  // Adds the result of that GEMM, which has ended, to the sums of the third.
  template <int kCount>
  __device__ __forceinline__ void add(float (&sums)[kCount / 2], float (&part)[kCount / 2],
                                      const float2 (&scales)[kCount / 8]) const {
    pin(part);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      sums[i] += part[i] * (i % 2 == 0 ? scales[i / 4].x : scales[i / 4].y);
    }
  }

  // Adds all stages of a tile of kUsed times kCount pairs, and writes the result.
  //
  // The first stage is full.
  template <int kCount, int kUsed>
  __device__ __forceinline__ void run() {
    // results of 64 pairs leave registers for two thirds at a time
    constexpr int kAhead = kMany && kCount <= 64 && kUsed > 1 ? 2 : 1;
    float sums[kUsed][kCount / 2], parts[kAhead][kScaleParts][kCount / 2];
#pragma unroll
    for (int i = 0; i < kUsed * kCount / 2; ++i) sums[i / (kCount / 2)][i % (kCount / 2)] = 0.0f;
    const int pieces = job.width / kPiece;
    uint32_t peaks[2];
    uint2 zeros[2];
    read_peaks(peaks, zeros);
    Tile tile;
    for (int piece = 0; piece < pieces; ++piece, turn.advance()) {
      if (piece > 0) barrier_wait(turn.is_full(), turn.parity);
      uint32_t codes[4][4];
      // The warpgroups take turns, so that one turns codes during the other one's GEMMs.
      if (kMany) named_barrier_apart(own_barrier, 256);
      read_codes(zeros, codes);
      pin(codes);
      if (kMany) named_barrier_arrive(kFirstBarrier + kSecondBarrier - own_barrier, 256);
      // The copies of threads become visible to wgmma here, as a fence after the copy would wait
      // for it.
      publish_to_async();
#pragma unroll
      for (int third = 0; third < kAhead; ++third) multiply<kCount>(parts[third], codes, third);
#pragma unroll
      for (int third = 0; third < kUsed; ++third) {
        float2 scales[kCount / 8];
        read_scales<kCount>(scales, turn.pair_scales() + third * (kCount * 4));
        if (kAhead > 1 && third + 1 < kUsed) wgmma_wait<kAhead - 1>();
        else wgmma_wait<0>();
        // the tensor cores read them until here
        if (third + 1 == kUsed) pin(codes);
        add<kCount>(sums[third], parts[third % kAhead][0], scales);
        if (third + kAhead < kUsed) multiply<kCount>(parts[third % kAhead], codes, third + kAhead);
      }
      // not kept from the beginning, as registers are few
      if (piece + 1 == pieces) tile = load_tile(turn.own_tile());
      warp_arrive(turn.is_free(), lane);
    }
    store<kCount, kUsed>(tile, sums, peaks);
  }

  // A stage of up to kCount pairs, whose GEMM has started.
  template <int kCount>
  struct Started {
    uint32_t codes[4][4];
    float parts[kScaleParts][kCount / 2];
    float2 scales[kScaleParts][kCount / 8];
    uint32_t pair_scales, is_free;  // shared address, barrier
  };

  // Starts the GEMM of the next stage, which is full.
  template <int kCount>
  __device__ __forceinline__ void start(const uint2 (&zeros)[2], Started<kCount>& stage) {
    read_codes(zeros, stage.codes);
    pin(stage.codes);
    publish_to_async();
    multiply<kCount>(stage.parts, stage.codes, 0);
    stage.pair_scales = turn.pair_scales(), stage.is_free = turn.is_free();
    if (kScaleParts == 1) read_scales<kCount>(stage.scales[0], stage.pair_scales);
    turn.advance();
  }

  // Adds the result of a stage and leaves it to the copies. kLeft GEMMs that started later may not
  // have ended.
  template <int kCount, int kLeft>
  __device__ __forceinline__ void finish(float (&sums)[kCount / 2], Started<kCount>& stage) const {
    // not earlier, as the registers do not hold two scales of each pair for two stages
    if constexpr (kScaleParts > 1) {
#pragma unroll
      for (int i = 0; i < kScaleParts; ++i) {
        read_scales<kCount>(stage.scales[i], stage.pair_scales + i * (kPairs * 4));
      }
    }
    wgmma_wait<kLeft>();
    pin(stage.codes);
#pragma unroll
    for (int i = 0; i < kScaleParts; ++i) add<kCount>(sums, stage.parts[i], stage.scales[i]);
    warp_arrive(stage.is_free, lane);
  }

  // Adds all stages of a tile of up to kCount pairs, two at a time, and writes the result.
  template <int kCount>
  __device__ __forceinline__ void run_few(const Tile& tile) {
    float sums[1][kCount / 2] = {};
    uint32_t peaks[2];
    uint2 zeros[2];
    read_peaks(peaks, zeros);
    Started<kCount> even, odd;
    int left = job.width / kPiece;
    // With a GEMM across the end of an iteration the compiler would wait for each one.
    for (; left >= 2; left -= 2) {
      barrier_wait(turn.is_full(), turn.parity);
      start<kCount>(zeros, even);
      barrier_wait(turn.is_full(), turn.parity);
      start<kCount>(zeros, odd);
      finish<kCount, 1>(sums[0], even);
      finish<kCount, 0>(sums[0], odd);
    }
    if (left == 1) {
      barrier_wait(turn.is_full(), turn.parity);
      start<kCount>(zeros, even);
      finish<kCount, 0>(sums[0], even);
    }
    store<kCount, 1>(tile, sums, peaks);
  }

  // Returns 2^(peak - 127 - 13) without the power of two that factors have.
  static __device__ __forceinline__ float scale_of_peak(uint32_t peak) {
    return __uint_as_float(static_cast<uint32_t>(max(static_cast<int>(peak) - kRaised, 0)) << 23) *
           kFactor;
  }

  // Writes the results of a tile. A warpgroup's rows of 32 pairs meet in shared memory, so that it
  // writes 64 bytes of a row at a time if the tile is gated, else 128.
  template <int kCount, int kUsed>
  __device__ __forceinline__ void store(const Tile& tile, const float (&sums)[kUsed][kCount / 2],
                                        const uint32_t (&peaks)[2]) {
    constexpr int kChunks = (kCount + kChunk - 1) / kChunk, kRowThreads = kGated ? 4 : 8;
    constexpr int kPasses = kGated ? 1 : 2, kPassRows = kChunk / kPasses;
    // no register has what follows from them during the GEMMs
    const int lane = unknown(this->lane), warp = unknown(this->warp);
    const int warpgroup = warp / 4, thread = warp % 4 * kWarp + lane;
    const int32_t* pairs = pairs_of(job, tile);
    int32_t rows[kUsed][kChunks * kPasses];
#pragma unroll
    for (int i = 0; i < kUsed * kChunks * kPasses; ++i) {
      const int third = i / (kChunks * kPasses), pass = i % (kChunks * kPasses);
      const int pair = pass * kPassRows + thread / kRowThreads, at = third * kCount + pair;
      rows[third][pass] = pair < kCount && at < tile.left ? __ldg(pairs + at) : -1;
    }
    const float* own = job.factors + tile.expert * (1 + kGated);
    const float factor = __ldg(own) * scale_of_peak(peaks[0]);
    const float next_factor = __ldg(own + kGated) * scale_of_peak(peaks[1]);
    const uint32_t lines = base + F::kLines + warpgroup * F::kLinesBytes;
    // where this lane's row of a matrix goes, and what this thread writes
    const uint32_t to = lines + warp % 4 * (kWarpColumns * 2) +
                        (kGated ? lane * kLine : lane % 16 * kLine + lane / 16 * 16);
    const uint32_t from = lines + thread / kRowThreads * kLine + thread % kRowThreads * 16;
    // this thread's first column
    const int first = (tile.group * 2 + warpgroup) * kRowColumns + thread % kRowThreads * 8;
    char* out = static_cast<char*>(job.out) + first * 2;
    // the rows of the last tile were read
    named_barrier(kLinesBarrier + warpgroup, 128);
#pragma unroll
    for (int i = 0; i < kUsed * kChunks; ++i) {
      const int third = i / kChunks, chunk = i % kChunks;
      const uint32_t buffer = i % 2 * kChunkBytes;
      store_chunk<kCount>(sums[third], chunk, factor, next_factor, to + buffer);
      named_barrier(kLinesBarrier + warpgroup, 128);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int64_t row = rows[third][chunk * kPasses + pass];
        const uint32_t at = from + buffer + pass * (kPassRows * kLine);
        if constexpr (kInFp8 && kGated) {
          write_codes(tile.group, row, first, at, warpgroup);
        } else if (row >= 0) {
          *reinterpret_cast<uint4*>(out + row * job.columns * 2) = load_shared_uint4(at);
        }
      }
    }
  }

  // Writes 8 columns of a row as e4m3 codes. Both warpgroups call it, four threads for each row.
  //
  // The largest of a row's 64 columns gives their scale. A warpgroup tells the other one what it has
  // in the part of its lines that a gated tile leaves free, at two places in turn.
  //
  // Args:
  //   row: the pair, or -1 to write nothing
  //   column: first of the columns
  //   at: shared address of their values
  __device__ __forceinline__ void write_codes(int group, int64_t row, int column, uint32_t at,
                                              int warpgroup) {
    const uint4 words = load_shared_uint4(at);
    const float values[8] = {low_of(words.x), high_of(words.x), low_of(words.y), high_of(words.y),
                             low_of(words.z), high_of(words.z), low_of(words.w), high_of(words.w)};
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(values[i]));  // ignores NaN
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const bool is_first = column % kRowColumns == 0;
    const uint32_t own = at - column % kRowColumns * 2 + kRowColumns * 2 + (is_odd ? 4 : 0);
    if (is_first) store_shared(own, largest);
    named_barrier(kBothBarrier, 256);
    largest = fmaxf(largest, load_shared_float(warpgroup == 0 ? own + F::kLinesBytes
                                                              : own - F::kLinesBytes));
    is_odd = !is_odd;
    if (row < 0) return;
    // the inverse of infinity is 0 here, so that all codes of such a row are 0 or NaN
    const float scale = scale_of(largest, true), inverse = 1.0f / scale;
    if (is_first && warpgroup == 0) job.out_scales[group * job.out_stride + row] = scale;
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = pack_codes(values[2 * i] * inverse, values[2 * i + 1] * inverse);
    }
    *reinterpret_cast<uint2*>(static_cast<char*>(job.out) + row * job.columns + column) = {
        codes[0] | codes[1] << 16, codes[2] | codes[3] << 16};
  }

  // Writes this warp's columns of 32 pairs of a third to shared memory.
  template <int kCount>
  __device__ __forceinline__ void store_chunk(const float (&sums)[kCount / 2], int chunk,
                                              float factor, float next_factor, uint32_t to) const {
    uint32_t values[2][4];  // of the first column, or of a gated one, and of the second one
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // the last chunk of a third may have fewer eights of pairs
      const int eight = chunk * 4 + i < kCount / 8 ? chunk * 4 + i : chunk * 4;
      const float* x = sums + eight * 4;
      const float upper[2] = {x[0] * factor, x[1] * factor};
      const float lower[2] = {x[2] * next_factor, x[3] * next_factor};
      values[0][i] = kGated ? pack_bfloat16(gated(upper[0], lower[0], job.limit),
                                            gated(upper[1], lower[1], job.limit))
                            : pack_bfloat16(upper[0], upper[1]);
      values[1][i] = pack_bfloat16(lower[0], lower[1]);
    }
    if constexpr (kGated) {
      store_matrices_transposed(to, values[0]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t both[4] = {values[0][2 * half], values[0][2 * half + 1],
                                  values[1][2 * half], values[1][2 * half + 1]};
        store_matrices_transposed(to + half * (16 * kLine), both);
      }
    }
  }

  static __device__ __forceinline__ float gated(float gate, float up, float limit) {
    // fminf ignores NaN
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return silu_times(gate, up);
  }

  // Multiplies tile after tile.
  __device__ __forceinline__ void run() {
    for (;;) {
      barrier_wait(turn.is_full(), turn.parity);
      const Tile first = load_tile(turn.own_tile());
      if (first.expert == static_cast<int>(kNoTile)) break;
      const int count = first.left;
      if constexpr (kMany) {
        if (count <= 32) run<32, 1>();
        else if (count <= 64) run<64, 1>();
        else if (count <= 80) run<80, 1>();
        else if (count <= 96) run<48, 2>();
        else if (count <= 128) run<64, 2>();
        else if (count <= 160) run<80, 2>();
        else if (count <= 192) run<64, 3>();
        else if (count <= 216) run<72, 3>();
        else run<80, 3>();
      } else if constexpr (kPairs > 16) {
        if (count <= 16) run_few<16>(first);
        else if (count <= 32) run<32, 1>();
        else run<32, 2>();
      } else {
        run_few<16>(first);
      }
    }
    // the last turn of the other warpgroup
    if (kMany && own_barrier == kFirstBarrier) named_barrier_apart(kFirstBarrier, 256);
  }
};

#endif

// Multiplies rows of experts; `blocks` blocks take tiles in turn.
//
// kInFp8: the rows between both GEMMs are in FP8.
template <bool kGated, int kPairs, bool kInFp8>
__global__ void __launch_bounds__(kThreads, Form<kPairs>::kBlocks)
    multiply_experts(const __grid_constant__ Job job, uint32_t blocks) {
#if defined(FD_DSA_HOPPER)
  using F = Form<kPairs>;
  const uint32_t base = shared_address(shared_memory());
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  using Multiplier = experts_fp4::Multiplier<kGated, kPairs, kInFp8>;
  if (threadIdx.x == 0) prepare_stages(Turn<kPairs>{{base}});
  wait_for_inputs();
  start_next();
  if (warp == 1) count_tiles<kPairs>(job, base + F::kEnds, lane);
  __syncthreads();
  if (warp < 8) {
    more_registers<F::kComputeRegisters>();
    Multiplier(job, base, warp, lane).run();
  } else {
    fewer_registers<F::kCopyRegisters>();
    const int thread = threadIdx.x % 128;
    copy_tiles(
        Turn<kPairs>{{base}}, F::kMany ? job.taken : nullptr, base + F::kNext, blocks, thread,
        [&](uint32_t number, Tile& tile) { return find<kPairs>(job, base, number, tile); },
        [&](const Tile& tile, uint32_t, Turn<kPairs>& turn) {
          copy_stages<kGated, Multiplier::kScaleParts>(job, tile, thread, turn);
        });
  }
#endif
}

// ---- the launch

// With fewer pairs of an expert on average tiles have 16, and the rows between both GEMMs may be in FP8.
constexpr int kFew = 16;
// From this average on tiles have 240, and a counter in memory gives them to blocks.
constexpr int kManyPairs = 64;

inline int mean_pairs(const Job& job) { return job.num_pairs / job.num_experts; }

// Returns true if the rows between both GEMMs are in FP8.
inline bool is_in_fp8(const Job& job) { return job.out_scales != nullptr || job.x_group < kPiece; }

inline bool is_supported(const Job& job) {
  const int step = job.is_gated != 0 ? kHalfColumns : kColumns;
  return job.width > 0 && job.width % kPiece == 0 && job.columns % step == 0 &&
         job.num_experts > 0 && job.num_experts <= kMaxExperts && job.row_pairs > 0 &&
         (job.taken != nullptr || mean_pairs(job) < kManyPairs) && job.factors != nullptr &&
         job.peaks != nullptr &&
         job.x_stride >= job.num_rows && (!is_in_fp8(job) || mean_pairs(job) < kFew) &&
         (job.x_group == kPiece || (job.x_group == kPiece / 2 && job.is_gated == 0)) &&
         (job.out_scales == nullptr || (job.out_stride >= job.num_pairs && job.is_gated != 0)) &&
         job.num_rows * job.row_pairs == job.num_pairs &&
         // 32-bit numbers count the chunks of codes, and divide pairs
         job.num_rows * (job.width / 16) < 1ll << 32 &&
         static_cast<int64_t>(job.num_pairs) * job.row_pairs < 1ll << 32 && is_aligned(job.peaks) &&
         is_aligned(job.x) && is_aligned(job.weight) && is_aligned(job.weight_scales) &&
         is_aligned(job.out);
}

template <bool kGated, int kPairs, bool kInFp8 = false>
static int launch_experts(const Job& job, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  using F = Form<kPairs>;
  uint32_t blocks = 0;
  const auto kernel = multiply_experts<kGated, kPairs, kInFp8>;
  const cudaError_t error =
      prepare_tiles(kernel, job, kPairs, column_groups(job), F::kBytes, F::kBlocks,
                    F::kMany ? job.taken : nullptr, stream, prepared, blocks);
  if (error != cudaSuccess) return static_cast<int>(error);
  auto config = launch_config(blocks, kThreads, stream, F::kBytes);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = !F::kMany && job.starts_early != 0 ? 1 : 0;
  return launch(config, kernel, job, blocks);
}

// Launches the form whose tiles hold the pairs of nearly all experts, or large ones. On an H200 the
// limits are the fastest of means of 1 to 200 pairs, at the widths of DeepSeek-V4-Flash.
template <bool kGated>
static int launch_form(const Job& job, void* stream) {
  const int mean = mean_pairs(job);
  if (is_in_fp8(job)) return launch_experts<kGated, kFew, true>(job, stream);
  if (mean < kFew) return launch_experts<kGated, kFew>(job, stream);
  if (mean < kManyPairs) return launch_experts<kGated, 64>(job, stream);
  return launch_experts<kGated, 240>(job, stream);
}

}  // namespace fd_dsa::experts_fp4

extern "C" int fd_dsa_expert_gemm_fp4_cuda(const FdDsaExpertGemmFp4* job, void* stream) {
  using namespace fd_dsa::experts_fp4;
  if (job->num_pairs <= 0 || job->columns <= 0) return 0;
  if (!is_supported(*job)) return static_cast<int>(cudaErrorInvalidValue);
  return job->is_gated != 0 ? launch_form<true>(*job, stream) : launch_form<false>(*job, stream);
}

extern "C" int fd_dsa_expert_gemm_fp4_bytes() {
  return static_cast<int>(sizeof(FdDsaExpertGemmFp4));
}
