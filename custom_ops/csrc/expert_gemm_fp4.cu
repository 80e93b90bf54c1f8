// The grouped GEMM of routed experts in MXFP4 by activations in FP8, for prompts.
//
// A first kernel rounds the activations to e4m3 codes with a scale for 128 values, as the released
// models do. The second kernel multiplies. Its tiles are up to 240 pairs of an expert by 128 columns.
// A gated tile has 64 columns of the gate and the 64 that they multiply.
//
// One warpgroup copies operands, 128 values along K at a time, up to five such stages ahead. Two
// warpgroups multiply, 64 columns each. Columns are the rows of the tensor cores' result, so a
// thread turns four-bit codes into e4m3 codes in its registers, and the tensor cores read them
// there. A code that is turned once meets all pairs of the tile, a third of them at a time.
//
// A group of 32 values has a scale, a power of two. The largest scale of a column multiplies its
// sums at the end, and the codes are smaller by what their own scales lack. That is exact for scales
// down to 2^-14 of the largest one. Codes below round to a denormal number or to zero.
//
// A stage's codes of a column are 16 words (FourBitWeight of fd_dsa/tensor.py). A lane has four of
// them, and the order of its codes along K follows from the order of their bits. The first kernel
// stores the activations in that order, see `round_values`.
//
// Turning codes takes a third of a warpgroup's time. The warpgroups take turns at it, so that the
// tensor cores multiply for the other one meanwhile.
//
// Sources: OCP Microscaling Formats 1.0 for the formats; PTX ISA 8.5 for `prmt`, which looks up four
// codes at once, and for the operands of wgmma; FlashAttention-3 (arXiv 2407.08608) section 3.1 for
// warpgroups that take turns.
#include "expert_gemm_fp4.h"

#include "expert_tiles.cuh"

namespace fd_dsa::experts_fp4 {

using namespace hopper;
using namespace experts;
using Job = FdDsaExpertGemmFp4;

constexpr int kPiece = 128;  // values of a stage along K
constexpr int kColumns = 128, kHalfColumns = kColumns / 2;
constexpr int kThirds = 3, kThird = 80, kPairs = kThirds * kThird;
constexpr int kStages = 5, kThreads = 384;
// exponent of 2 of the factors that FourBitWeight has
[[maybe_unused]] constexpr float kFactor = 1.0f / (1 << 26);
// The code of a value with the largest scale is that of 2^6 times the value: up to 384 of 448.
[[maybe_unused]] constexpr int kRaised = 6;
constexpr int kScaleCodes = 256;

// Offsets in shared memory, in bytes. The activations of a stage are rows of 128 bytes, swizzled.
constexpr uint32_t kActivations = kPairs * kPiece;
// Four-bit codes and scales of a stage's columns, and the scales of its pairs.
constexpr uint32_t kCodes = kColumns * kPiece / 2, kScales = kColumns * 4;
constexpr uint32_t kAllCodes = kStages * kActivations, kAllScales = kAllCodes + kStages * kCodes;
constexpr uint32_t kPairScales = kPairs * 4, kAllPairScales = kAllScales + kStages * kScales;
// Twice 32 result rows of each warpgroup, 128 bytes each. Another 16 put neighbours in different
// banks.
constexpr uint32_t kLine = 128 + 16, kChunk = 32, kChunkBytes = kChunk * kLine;
constexpr uint32_t kLines = kAllPairScales + kStages * kPairScales;
// The table of `write_table`. Then each stage's tile, and the peaks of a tile's columns.
constexpr uint32_t kTable = kLines + 2 * 2 * kChunkBytes;
constexpr uint32_t kOwnTiles = kTable + kScaleCodes * 8, kPeaks = kColumns;
constexpr uint32_t kAllPeaks = kOwnTiles + kStages * 16;
constexpr uint32_t kEnds = kAllPeaks + kStages * kPeaks;
constexpr uint32_t kNext = (kEnds + 4 * kMaxExperts + 7) / 8 * 8;
constexpr uint32_t kBarriers = kNext + 2 * 4;
constexpr uint32_t kBytes = kBarriers + 2 * kStages * 8;
static_assert(kBytes <= 232448 && kLines % 16 == 0 && kTable % 16 == 0 && kNext % 8 == 0);

// Named barriers: the turns of each warpgroup, and the result rows of the first one. Those of the
// second one have the next number.
enum { kFirstBarrier = kFirstOwnBarrier, kSecondBarrier, kLinesBarrier };

__host__ __device__ __forceinline__ int column_groups(const Job& job) {
  return job.columns / (job.is_gated != 0 ? kHalfColumns : kColumns);
}

// ---- the kernel that rounds activations

constexpr int kValuesPerThread = 16, kRoundingThreads = 256;

#if defined(FD_DSA_HOPPER)

// Rounds 16 values of a group of 128. Eight neighbouring threads have a group.
//
// Thread (h, c) of h = 0, 1 and c = 0..3 has values 64 h + 16 j + 4 c + i for j, i = 0..3.
// Value (j, i) is byte (j + 3) % 4 of the word at 32 i + 16 h + 4 c, which is its place in `codes`.
__device__ __forceinline__ void round_values(const Job& job, int64_t thread) {
  const int groups = job.width / kPiece;
  const int64_t group = thread / 8;
  const int64_t row = group / groups;
  const int part = static_cast<int>(group % groups);
  // all threads of a warp take part in the exchange
  const bool is_live = row < job.num_rows;
  const int h = static_cast<int>(thread / 4 % 2), c = static_cast<int>(thread % 4);
  const int64_t at = is_live ? row * job.width + part * kPiece : 0;
  const char* from = static_cast<const char*>(job.x) + (at + 64 * h + 4 * c) * 2;
  float x[4][4], largest = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint2 both = load_8(from + j * 32, is_live);
    x[j][0] = low_of(both.x), x[j][1] = high_of(both.x);
    x[j][2] = low_of(both.y), x[j][3] = high_of(both.y);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(x[j][i]));
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
  }
  if (!is_live) return;
  // the inverse of a power of two is exact
  const float scale = scale_of(largest, true), inverse = 1.0f / scale;
  if (thread % 8 == 0) job.code_scales[static_cast<int64_t>(part) * job.num_rows + row] = scale;
  auto* to = reinterpret_cast<uint32_t*>(static_cast<char*>(job.codes) + at + 16 * h + 4 * c);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = pack_codes(x[1][i] * inverse, x[2][i] * inverse);
    to[i * 8] = low | static_cast<uint32_t>(pack_codes(x[3][i] * inverse, x[0][i] * inverse)) << 16;
  }
}

#endif

__global__ void __launch_bounds__(kRoundingThreads)
    round_activations(const __grid_constant__ Job job) {
#if defined(FD_DSA_HOPPER)
  round_values(job, static_cast<int64_t>(blockIdx.x) * kRoundingThreads + threadIdx.x);
#endif
}

#if defined(FD_DSA_HOPPER)

struct Turn : StageTurn<kStages, kBarriers> {
  __device__ __forceinline__ uint32_t activations() const { return base + stage * kActivations; }
  __device__ __forceinline__ uint32_t codes() const { return base + kAllCodes + stage * kCodes; }
  __device__ __forceinline__ uint32_t scales() const { return base + kAllScales + stage * kScales; }
  __device__ __forceinline__ uint32_t pair_scales() const {
    return base + kAllPairScales + stage * kPairScales;
  }
  __device__ __forceinline__ uint32_t own_tile() const { return base + kOwnTiles + stage * 16; }
  __device__ __forceinline__ uint32_t peaks() const { return base + kAllPeaks + stage * kPeaks; }
};

__device__ __forceinline__ bool find(const Job& job, uint32_t base, uint32_t number, Tile& tile) {
  if (!find_tile<kPairs>(job, column_groups(job), base + kEnds, number, tile)) return false;
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

// Writes the e4m3 codes of the eight sizes of e2m1 values times 2^(6 - i) to entry i. 64 threads call
// it.
__device__ __forceinline__ void write_table(uint32_t base, int thread) {
  const auto value = [](int size) {
    return size < 2 ? 0.5f * static_cast<float>(size)
                    : static_cast<float>(2 + size % 2) * static_cast<float>(1 << size / 2) * 0.25f;
  };
  const int size = thread % 4 * 2;
  for (int entry = thread / 4; entry < kScaleCodes; entry += 16) {
    const int exponent = max(127 + kRaised - entry, 1);
    const float scale = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
    const uint16_t both = pack_codes(value(size) * scale, value(size + 1) * scale);
    store_shared(base + kTable + entry * 8 + size, both);
  }
}

// ---- the warpgroup that copies operands

// Copies all stages of a tile. Thread t copies chunk t % 8 of rows t / 8 + 16 i, and the scales of
// rows t and t + 128. The first stage has the peaks of the columns, too.
template <bool kGated>
__device__ __forceinline__ void copy_stages(const Job& job, const Tile& tile, int thread,
                                            Turn& turn) {
  const int32_t* pairs = pairs_of(job, tile);
  const int count = tile.left;
  constexpr int kRowsPerThread = kPairs / 16;
  uint32_t chunks[kRowsPerThread], scale_rows[2];  // chunks from the beginning of the codes
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
  for (int i = 0; i < 2; ++i) scale_rows[i] = row_at(thread + i * 128);
  constexpr int kParts = kGated ? 2 : 1;
  const int pieces = job.width / kPiece;
  const int tile_columns = tile.group * (kGated ? kHalfColumns : kColumns);
  const uint32_t to = swizzled(thread / 8, thread % 8);
  const char* x = static_cast<const char*>(job.codes) + thread % 8 * 16;
  const float* scales = job.code_scales;
  for (int piece = 0; piece < pieces; ++piece, turn.advance()) {
    const uint32_t full = turn.is_full();
    barrier_wait(turn.is_free(), turn.parity ^ 1);
    if (thread == 0) {
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
    }
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
    for (int i = 0; i < 2; ++i) {
      const int at = thread + i * 128;
      if (at < kPairs) {
        copy_few<4>(turn.pair_scales() + at * 4, scales + scale_rows[i], at < count);
      }
    }
    barrier_arrive_after_copies(full);
    x += kPiece;
    scales += job.num_rows;
  }
}

// ---- the warpgroups that multiply

// Sets the e4m3 codes of a word: `low` of its lower half, `high` of its upper half.
//
// A byte has code (byte + 1) % 4 of the half. Codes 0 and 1 of a half belong to one group, and codes
// 2 and 3 to the next one.
//
// Args:
//   tables: entries of `write_table` for the four groups of a column.
__device__ __forceinline__ void turn_codes(uint32_t word, const uint2 (&tables)[4], uint32_t& low,
                                           uint32_t& high) {
  // the sizes of codes 1, 2, 3 and 0 in the four nibbles of each half
  const uint32_t sizes = (word & 0x00070007u) | (word << 1 & 0x40704070u) |
                         (word << 2 & 0x37003700u);
  const uint32_t signs = word & 0xd200d200u;
  const auto half = [&](uint32_t nibbles, uint32_t sign, const uint2& first, const uint2& second) {
    const uint32_t outer = __byte_perm(first.x, first.y, nibbles);
    const uint32_t inner = __byte_perm(second.x, second.y, nibbles);
    // The multiplication moves each sign to the top of its byte. No sum below carries into one.
    return __byte_perm(outer, inner, 0x3650) | (sign * 0x02010840u & 0x80808080u);
  };
  low = half(sizes, __byte_perm(signs, 0, 0x4441), tables[0], tables[1]);
  high = half(sizes >> 16, signs >> 24, tables[2], tables[3]);
}

// Warpgroup 0 or 1 with its 64 columns of each tile.
//
// A thread has two columns, 8 rows of the tensor cores' result apart, and two neighbouring pairs of
// each 8. Value j * 4 + r * 2 + p is that of column r and of pair 8 j + lane % 4 * 2 + p.
template <bool kGated>
struct Multiplier {
  // columns of a warp in a stage, and from a thread's first column to its second one
  static constexpr int kWarpColumns = kGated ? 8 : 16, kNextColumn = kGated ? kHalfColumns : 8;

  const Job& job;
  uint32_t base;
  int warp, lane;  // index of the warp among both warpgroups
  int column;      // first column of this thread in a stage
  int own_barrier;
  Turn turn;

  __device__ __forceinline__ Multiplier(const Job& job, uint32_t base, int warp, int lane)
      : job(job), base(base), warp(warp), lane(lane), turn{{base}} {
    column = warp * kWarpColumns + lane / 4;
    own_barrier = warp < 4 ? kFirstBarrier : kSecondBarrier;
    // the first warpgroup has the first turn
    if (own_barrier == kSecondBarrier) named_barrier_arrive(kFirstBarrier, 256);
  }

  // Turns the codes of a stage, for four steps of wgmma.
  //
  // `peaks` has each column's largest scale in all four bytes.
  __device__ __forceinline__ void read_codes(const uint32_t (&peaks)[2],
                                             uint32_t (&codes)[4][4]) const {
    uint4 words[2];
    uint32_t below[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = column + r * kNextColumn;
      words[r] = load_shared_uint4(turn.codes() + own * (kPiece / 2) + lane % 4 * 16);
      // no byte is above the peak's
      below[r] = peaks[r] - load_shared(turn.scales() + own * 4);
    }
    uint2 tables[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      tables[i / 4][i % 4] =
          load_shared_uint2(base + kTable + (below[i / 4] >> 8 * (i % 4) & 255) * 8);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      turn_codes(words[r].x, tables[r], codes[0][r], codes[0][2 + r]);
      turn_codes(words[r].y, tables[r], codes[1][r], codes[1][2 + r]);
      turn_codes(words[r].z, tables[r], codes[2][r], codes[2][2 + r]);
      turn_codes(words[r].w, tables[r], codes[3][r], codes[3][2 + r]);
    }
  }

  // Starts the GEMM of a third of kCount pairs over a stage.
  template <int kCount>
  __device__ __forceinline__ void multiply(float (&part)[kCount / 2], const uint32_t (&codes)[4][4],
                                           int third) const {
    const Operand pairs = k_major(turn.activations() + third * (kCount * kPiece));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_code_rows<kCount>(part, codes[i], pairs.at(i * 32), i > 0);
    wgmma_commit();
  }

  // Loads the scales of this thread's pairs of a third.
  template <int kCount>
  __device__ __forceinline__ void read_scales(float2 (&scales)[kCount / 8], int third) const {
    const uint32_t from = turn.pair_scales() + third * (kCount * 4) + lane % 4 * 8;
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
    constexpr int kAhead = kCount <= 64 && kUsed > 1 ? 2 : 1;
    float sums[kUsed][kCount / 2], parts[kAhead][kCount / 2];
#pragma unroll
    for (int i = 0; i < kUsed * kCount / 2; ++i) sums[i / (kCount / 2)][i % (kCount / 2)] = 0.0f;
    const int pieces = job.width / kPiece;
    const uint32_t peaks[2] = {load_shared_byte(turn.peaks() + column) * 0x01010101u,
                               load_shared_byte(turn.peaks() + column + kNextColumn) * 0x01010101u};
    Tile tile;
    for (int piece = 0; piece < pieces; ++piece, turn.advance()) {
      if (piece > 0) barrier_wait(turn.is_full(), turn.parity);
      uint32_t codes[4][4];
      // The warpgroups take turns, so that one turns codes during the other one's GEMMs.
      named_barrier_apart(own_barrier, 256);
      read_codes(peaks, codes);
      pin(codes);
      named_barrier_arrive(kFirstBarrier + kSecondBarrier - own_barrier, 256);
      // The copies of threads become visible to wgmma here, as a fence after the copy would wait
      // for it.
      publish_to_async();
#pragma unroll
      for (int third = 0; third < kAhead; ++third) multiply<kCount>(parts[third], codes, third);
#pragma unroll
      for (int third = 0; third < kUsed; ++third) {
        float2 scales[kCount / 8];
        read_scales<kCount>(scales, third);
        if (kAhead > 1 && third + 1 < kUsed) wgmma_wait<kAhead - 1>();
        else wgmma_wait<0>();
        // the tensor cores read them until here
        if (third + 1 == kUsed) pin(codes);
        add<kCount>(sums[third], parts[third % kAhead], scales);
        if (third + kAhead < kUsed) multiply<kCount>(parts[third % kAhead], codes, third + kAhead);
      }
      // not kept from the beginning, as registers are few
      if (piece + 1 == pieces) tile = load_tile(turn.own_tile());
      warp_arrive(turn.is_free(), lane);
    }
    store<kCount, kUsed>(tile, sums, peaks);
  }

  // Returns 2^(peak - 127 - 6) without the power of two that factors have.
  static __device__ __forceinline__ float scale_of_peak(uint32_t peak) {
    return __uint_as_float(static_cast<uint32_t>(max(static_cast<int>(peak) - kRaised, 0)) << 23) *
           kFactor;
  }

  // Writes the results of a tile. A warpgroup's rows of 32 pairs meet in shared memory, so that it
  // writes 64 bytes of a row at a time if the tile is gated, else 128.
  template <int kCount, int kUsed>
  __device__ __forceinline__ void store(const Tile& tile, const float (&sums)[kUsed][kCount / 2],
                                        const uint32_t (&peaks)[2]) const {
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
    const float factor = __ldg(own) * scale_of_peak(peaks[0] & 255);
    const float next_factor = __ldg(own + kGated) * scale_of_peak(peaks[1] & 255);
    const uint32_t lines = base + kLines + warpgroup * (2 * kChunkBytes);
    // where this lane's row of a matrix goes, and what this thread writes
    const uint32_t to = lines + warp % 4 * (kWarpColumns * 2) +
                        (kGated ? lane * kLine : lane % 16 * kLine + lane / 16 * 16);
    const uint32_t from = lines + thread / kRowThreads * kLine + thread % kRowThreads * 16;
    const int first = (tile.group * 2 + warpgroup) * (4 * kWarpColumns);
    char* out = static_cast<char*>(job.out) + first * 2 + thread % kRowThreads * 16;
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
        if (const int64_t row = rows[third][chunk * kPasses + pass]; row >= 0) {
          *reinterpret_cast<uint4*>(out + row * job.columns * 2) =
              load_shared_uint4(from + buffer + pass * (kPassRows * kLine));
        }
      }
    }
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
      if (count <= 32) run<32, 1>();
      else if (count <= 64) run<64, 1>();
      else if (count <= 80) run<80, 1>();
      else if (count <= 96) run<48, 2>();
      else if (count <= 128) run<64, 2>();
      else if (count <= 160) run<80, 2>();
      else if (count <= 192) run<64, 3>();
      else if (count <= 216) run<72, 3>();
      else run<80, 3>();
    }
    // the last turn of the other warpgroup
    if (own_barrier == kFirstBarrier) named_barrier_apart(kFirstBarrier, 256);
  }
};

#endif

// Registers of a multiplying thread and of a copying thread, which start with 168 each.
constexpr int kComputeRegisters = 224, kCopyRegisters = 56;
static_assert(2 * kComputeRegisters + kCopyRegisters == 3 * 168);

// Multiplies rows of experts; `blocks` blocks take tiles in turn.
template <bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_experts(const __grid_constant__ Job job, uint32_t blocks) {
#if defined(FD_DSA_HOPPER)
  const uint32_t base = shared_address(shared_memory());
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) prepare_stages(Turn{{base}});
  if (warp == 1) count_tiles<kPairs>(job, base + kEnds, lane);
  if (warp == 2 || warp == 3) write_table(base, threadIdx.x - 2 * kWarp);
  __syncthreads();
  if (warp < 8) {
    more_registers<kComputeRegisters>();
    Multiplier<kGated>(job, base, warp, lane).run();
  } else {
    fewer_registers<kCopyRegisters>();
    const int thread = threadIdx.x % 128;
    copy_tiles(
        Turn{{base}}, job.taken, base + kNext, blocks, thread,
        [&](uint32_t number, Tile& tile) { return find(job, base, number, tile); },
        [&](const Tile& tile, uint32_t, Turn& turn) { copy_stages<kGated>(job, tile, thread, turn); });
  }
#endif
}

// ---- the launch

inline bool is_supported(const Job& job) {
  const int step = job.is_gated != 0 ? kHalfColumns : kColumns;
  return job.width > 0 && job.width % kPiece == 0 && job.columns % step == 0 &&
         job.num_experts > 0 && job.num_experts <= kMaxExperts && job.row_pairs > 0 &&
         job.taken != nullptr && job.factors != nullptr && job.peaks != nullptr &&
         static_cast<int64_t>(job.num_rows) * job.row_pairs == job.num_pairs &&
         // 32-bit numbers count the chunks of codes, and divide pairs
         static_cast<int64_t>(job.num_rows) * (job.width / 16) < 1ll << 32 &&
         static_cast<int64_t>(job.num_pairs) * job.row_pairs < 1ll << 32 && is_aligned(job.peaks) &&
         is_aligned(job.x) && is_aligned(job.codes) && is_aligned(job.weight) &&
         is_aligned(job.weight_scales) && is_aligned(job.out);
}

template <bool kGated>
static int launch_experts(const Job& job, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  uint32_t blocks = 0;
  const cudaError_t error = prepare_tiles(multiply_experts<kGated>, job, kPairs,
                                          column_groups(job), kBytes, stream, prepared, blocks);
  if (error != cudaSuccess) return static_cast<int>(error);
  const int64_t threads = static_cast<int64_t>(job.num_rows) * job.width / kValuesPerThread;
  const auto rounding =
      static_cast<unsigned>((threads + kRoundingThreads - 1) / kRoundingThreads);
  const int failed =
      launch(launch_config(rounding, kRoundingThreads, stream), round_activations, job);
  if (failed != 0) return failed;
  return launch(launch_config(blocks, kThreads, stream, kBytes), multiply_experts<kGated>, job,
                blocks);
}

}  // namespace fd_dsa::experts_fp4

extern "C" int fd_dsa_expert_gemm_fp4_cuda(const FdDsaExpertGemmFp4* job, void* stream) {
  using namespace fd_dsa::experts_fp4;
  if (job->num_pairs <= 0 || job->columns <= 0) return 0;
  if (!is_supported(*job)) return static_cast<int>(cudaErrorInvalidValue);
  return job->is_gated != 0 ? launch_experts<true>(*job, stream)
                            : launch_experts<false>(*job, stream);
}

extern "C" int fd_dsa_expert_gemm_fp4_bytes() {
  return static_cast<int>(sizeof(FdDsaExpertGemmFp4));
}
