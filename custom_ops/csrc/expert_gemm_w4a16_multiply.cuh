// Experts in NVFP4 or INT4: the warpgroups that turn codes and multiply.
#pragma once

#include "expert_gemm_w4a16_form.cuh"

namespace fd_dsa::experts_w4a16 {

#if defined(FD_DSA_HOPPER)

// Sets the values of eight codes of both halves of two words, times 2^-126.
//
// FourBitWeight of fd_dsa/tensor.py says where the words have the bits of codes of kind "e4m3".
__device__ __forceinline__ void turn_e2m1(const uint2& words, uint32_t (&values)[8]) {
  constexpr uint32_t kCode = 0x81c081c0u, kFirst = 0x00d800d8u, kBoth = 0x01f801f8u;
  // codes 0 and 4 in place, and three places lower
  uint32_t split = (words.x >> 7 & kFirst) | (words.y >> 6 & ~kFirst);
  split = (split & kBoth) | (words.y << 2 & ~kBoth);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t codes = half == 0 ? words.x : words.y;
    values[4 * half] = split << 3 * half & kCode;
    values[4 * half + 1] = codes << 6 & kCode;
    values[4 * half + 2] = codes << 3 & kCode;
    values[4 * half + 3] = codes & kCode;
  }
}

// Sets the values of eight codes of both halves of two words, less their zero point.
//
// The last bits of a bfloat16 from 128 to 255 count ones.
//
// Args:
//   zero: 128 plus the zero point, twice
__device__ __forceinline__ void turn_integers(const uint2& words, uint32_t zero,
                                              uint32_t (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t codes = i < 4 ? words.x : words.y;
    values[i] = minus_bfloat16(masked_or(codes >> i % 4 * 4, 0x000f000fu, 0x43004300u), zero);
  }
}

// Sets the bfloat16 scales of four codes of e4m3: `even` to those of codes 0 and 2.
//
// A code has the exponent, from a power of two on, and the upper three bits of the mantissa. Scales
// are raised by 2^107, see fd_dsa.ops.fp4.
__device__ __forceinline__ void turn_scales(uint32_t codes, uint32_t& even, uint32_t& odd) {
  constexpr uint32_t kExponent = 0x70007000u, kCode = 0x0ff00ff0u;
  even = (codes << 4 & kCode) | kExponent;
  odd = (codes >> 4 & kCode) | kExponent;
}

// Warpgroup 0 or 1 with two blocks of 64 columns of each tile.
//
// A thread has two columns of a block, 8 rows of the tensor cores' result apart, and two
// neighbouring pairs of each 8. `ResultLines` has the order of its sums.
template <bool kGated, bool kInteger>
struct Multiplier {
  using Lines = ResultLines<kGated>;
  // from a thread's first column to its second one, and to the next block
  static constexpr int kNextColumn = kGated ? kHalfColumns : 8;
  static constexpr int kNextBlock = Lines::kRowColumns;

  const Job& job;
  uint32_t base;
  int warp, lane;  // index of the warp among both warpgroups
  int column;      // first column of this thread in a stage
  Turn turn;

  __device__ __forceinline__ Multiplier(const Job& job, uint32_t base, int warp, int lane)
      : job(job), base(base), warp(warp), lane(lane), turn{{base}} {
    column = warp / 4 * (2 * kNextBlock) + warp % 4 * Lines::kWarpColumns + lane / 4;
  }

  // Returns the thread's column r of a block, as a column of a stage.
  __device__ __forceinline__ int column_of(int block, int r) const {
    return column + block * kNextBlock + r * kNextColumn;
  }

  // Loads the scale of an integer column, whose last four bits are the zero point.
  __device__ __forceinline__ uint32_t load_scale(int block, int r) const {
    return load_shared(turn.scales() + column_of(block, r) * 4);
  }

  // Turns the codes of a block of a stage, for 8 steps of wgmma.
  __device__ __forceinline__ void read_codes(int block, uint32_t (&codes)[8][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = column_of(block, r);
      const uint32_t words = turn.codes() + own * kColumnCodes + lane % 4 * 8;
      uint32_t zero = 0;
      uint2 e4m3 = {};
      if constexpr (kInteger) zero = __byte_perm((load_scale(block, r) & 15) | 0x4300, 0, 0x1010);
      else e4m3 = load_shared_uint2(turn.scales() + own * 8);
      uint32_t even[2] = {}, odd[2] = {};
      if constexpr (!kInteger) {
        turn_scales(e4m3.x, even[0], odd[0]);
        turn_scales(e4m3.y, even[1], odd[1]);
      }
      // values 2 t and 2 t + 1 of all steps, then those 8 further on
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const uint2 both = load_shared_uint2(words + next * 32);
        uint32_t values[8];
        if constexpr (kInteger) turn_integers(both, zero, values);
        else turn_e2m1(both, values);
#pragma unroll
        for (int step = 0; step < 8; ++step) {
          uint32_t& to = codes[step][next * 2 + r];
          to = values[step];
          if constexpr (kInteger) continue;
          const uint32_t scale = step % 2 == 0 ? even[step / 4] : odd[step / 4];
          to = step % 4 < 2 ? times_bfloat16<false>(to, scale) : times_bfloat16<true>(to, scale);
        }
      }
    }
  }

  // Starts the GEMM of a stage with a block, for kCount pairs from pair `first` on.
  template <int kCount>
  __device__ __forceinline__ void multiply(float (&sums)[kCount / 2], const uint32_t (&codes)[8][4],
                                           int first, bool adds) const {
    const Operand pairs = k_major(turn.activations() + first * 128);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      wgmma_rows<kCount, true>(sums, codes[step], pairs.at(step / 4 * kOperand + step % 4 * 32),
                               adds || step > 0);
    }
    wgmma_commit();
  }

  // Adds all stages of a tile of up to kCount pairs, and writes the result.
  //
  // The first stage is full. The codes of a block are turned during the GEMM of the block before.
  template <int kCount>
  __device__ __forceinline__ void run() {
    float sums[2][kCount / 2] = {};
    uint32_t first[8][4], second[8][4];
    Tile tile;
    publish_to_async();
    read_codes(0, first);
    for (int left = job.width / kPiece; left > 0; --left) {
      pin(first);
      multiply<kCount>(sums[0], first, 0, true);
      read_codes(1, second);
      pin(second);
      multiply<kCount>(sums[1], second, 0, true);
      const uint32_t is_free = turn.is_free();
      // not kept from the beginning, as registers are few
      if (left == 1) tile = load_tile(turn.own_tile());
      turn.advance();
      wgmma_wait<1>();
      pin(first);
      if (left > 1) {
        barrier_wait(turn.is_full(), turn.parity);
        // The copies of threads become visible to wgmma here, as a fence after the copy would wait
        // for it.
        publish_to_async();
        read_codes(0, first);
      }
      wgmma_wait<0>();
      pin(second);
      warp_arrive(is_free, lane);
    }
    pin(sums[0]);
    pin(sums[1]);
    store<kCount>(tile, sums);
  }

  // Adds all stages of a tile of integers, and writes the result.
  //
  // The first stage is full. Each GEMM gives the sums of a stage, which the scales of the stage then
  // multiply. Registers hold these sums of up to 64 pairs, so more pairs take two GEMMs.
  template <int kCount>
  __device__ __forceinline__ void run_scaled() {
    constexpr int kHalves = kCount <= 64 ? 1 : 2, kPart = kCount / kHalves;
    float sums[2][kCount / 2] = {};
    Tile tile;
    for (int left = job.width / kPiece; left > 0; --left) {
      publish_to_async();
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        uint32_t codes[8][4];
        float stage[kPart / 2];
        const float scales[2] = {__uint_as_float(load_scale(block, 0) & ~15u),
                                 __uint_as_float(load_scale(block, 1) & ~15u)};
        read_codes(block, codes);
        pin(codes);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          multiply<kPart>(stage, codes, half * kPart, false);
          wgmma_wait<0>();
          pin(codes);
          pin(stage);
          float* to = sums[block] + half * (kPart / 2);
#pragma unroll
          for (int i = 0; i < kPart / 2; ++i) to[i] += stage[i] * scales[i / 2 % 2];
        }
      }
      if (left == 1) tile = load_tile(turn.own_tile());
      warp_arrive(turn.is_free(), lane);
      turn.advance();
      if (left > 1) barrier_wait(turn.is_full(), turn.parity);
    }
    store<kCount>(tile, sums);
  }

  // Writes the results of a tile. A warpgroup's rows of 32 pairs meet in shared memory, so that it
  // writes 64 bytes of a row at a time if the tile is gated, else 128.
  template <int kCount>
  __device__ __forceinline__ void store(const Tile& tile, const float (&sums)[2][kCount / 2]) {
    constexpr int kChunks = (kCount + kChunk - 1) / kChunk;
    // hidden, so that no register holds values derived from them during the GEMMs
    const int lane = unknown(this->lane), warp = unknown(this->warp);
    const int warpgroup = warp / 4, thread = warp % 4 * kWarp + lane;
    const int32_t* pairs = pairs_of(job, tile);
    int32_t rows[kChunks * Lines::kPasses];
#pragma unroll
    for (int i = 0; i < kChunks * Lines::kPasses; ++i) {
      const int at = i * Lines::kPassRows + thread / Lines::kRowThreads;
      rows[i] = at < tile.left ? __ldg(pairs + at) : -1;
    }
    const float* own = job.factors + tile.expert * (1 + kGated);
    const float factor = kInteger ? 1.0f : __ldg(own);
    const float next_factor = kInteger ? 1.0f : __ldg(own + kGated);
    const Lines lines(base + kLines + warpgroup * kLinesBytes, warp % 4, lane, thread);
    // this thread's first column
    const int column = (tile.group * 4 + warpgroup * 2) * Lines::kRowColumns +
                       thread % Lines::kRowThreads * 8;
    char* out = static_cast<char*>(job.out) + column * 2;
    // the rows of the last tile were read
    named_barrier(kLinesBarrier + warpgroup, 128);
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      const int block = i % 2, chunk = i / 2;
      const uint32_t buffer = i % 2 * kChunkBytes;
      lines.template store_chunk<kCount>(sums[block], chunk, factor, next_factor, job.limit,
                                         buffer);
      named_barrier(kLinesBarrier + warpgroup, 128);
#pragma unroll
      for (int pass = 0; pass < Lines::kPasses; ++pass) {
        const int64_t row = rows[chunk * Lines::kPasses + pass];
        if (row < 0) continue;
        *reinterpret_cast<uint4*>(out + (row * job.columns + block * Lines::kRowColumns) * 2) =
            load_shared_uint4(lines.from + buffer + pass * (Lines::kPassRows * kLine));
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void run_tile() {
    if constexpr (kInteger) run_scaled<kCount>();
    else run<kCount>();
  }

  // Multiplies tile after tile.
  __device__ __forceinline__ void run_tiles() {
    for (;;) {
      barrier_wait(turn.is_full(), turn.parity);
      const Tile tile = load_tile(turn.own_tile());
      if (tile.expert == static_cast<int>(kNoTile)) break;
      const int count = tile.left;
      if (count <= 16) run_tile<16>();
      else if (count <= 32) run_tile<32>();
      else if (count <= 48) run_tile<48>();
      else if (count <= 64) run_tile<64>();
      else if (count <= 80) run_tile<80>();
      else if (count <= 96) run_tile<96>();
      else if (count <= 112) run_tile<112>();
      else run_tile<128>();
    }
  }
};

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::experts_w4a16
