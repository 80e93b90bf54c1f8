// Experts in MXFP4: the warpgroups that multiply.
#pragma once

#include "expert_gemm_fp4_form.cuh"

namespace fd_dsa::experts_fp4 {

#if defined(FD_DSA_HOPPER)

// Warpgroup 0 or 1 with its 64 columns of each tile.
//
// A thread has two columns, 8 rows of the tensor cores' result apart, and two neighbouring pairs of
// each 8. Value j * 4 + r * 2 + p is that of column r and of pair 8 j + lane % 4 * 2 + p.
template <bool kGated, int kPairs, bool kInFp8>
struct Multiplier {
  using F = Form<kPairs>;
  using Lines = ResultLines<kGated>;
  static constexpr bool kMany = F::kMany;
  // parts of a stage whose scales differ
  static constexpr int kScaleParts = kInFp8 && !kGated ? 2 : 1;
  // from a thread's first column to its second one
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
    column = warp * Lines::kWarpColumns + lane / 4;
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
    constexpr int kChunks = (kCount + kChunk - 1) / kChunk, kPasses = Lines::kPasses;
    constexpr int kPassRows = Lines::kPassRows, kRowThreads = Lines::kRowThreads;
    // hidden, so that no register holds values derived from them during the GEMMs
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
    const Lines lines(base + F::kLines + warpgroup * F::kLinesBytes, warp % 4, lane, thread);
    // this thread's first column
    const int first = (tile.group * 2 + warpgroup) * Lines::kRowColumns + thread % kRowThreads * 8;
    char* out = static_cast<char*>(job.out) + first * 2;
    // the rows of the last tile were read
    named_barrier(kLinesBarrier + warpgroup, 128);
#pragma unroll
    for (int i = 0; i < kUsed * kChunks; ++i) {
      const int third = i / kChunks, chunk = i % kChunks;
      const uint32_t buffer = i % 2 * kChunkBytes;
      lines.template store_chunk<kCount>(sums[third], chunk, factor, next_factor, job.limit, buffer);
      named_barrier(kLinesBarrier + warpgroup, 128);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int64_t row = rows[third][chunk * kPasses + pass];
        const uint32_t at = lines.from + buffer + pass * (kPassRows * kLine);
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
    const bool is_first = column % Lines::kRowColumns == 0;
    const uint32_t own = at + (Lines::kRowColumns - column % Lines::kRowColumns) * 2 + is_odd * 4;
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
      } else if (count <= 8) {
        run_few<8>(first);
      } else {
        run_few<16>(first);
      }
    }
    // the last turn of the other warpgroup
    if (kMany && own_barrier == kFirstBarrier) named_barrier_apart(kFirstBarrier, 256);
  }
};

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::experts_fp4
