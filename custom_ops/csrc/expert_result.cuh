// Result rows of experts in four bits: from registers through shared memory to the pairs' rows.
//
// The columns of a GEMM are the rows of the tensor cores' result. So a warp has 16 columns of the
// weight, or 8 columns of the gate and the 8 that they multiply.
#pragma once

#include "expert_tiles.cuh"
#include "hopper.cuh"

namespace fd_dsa::experts {

// 32 result rows of a warpgroup in shared memory, 128 bytes each. Another 16 bytes put neighbours in
// different banks.
constexpr int kChunk = 32;
constexpr uint32_t kLine = 128 + 16, kChunkBytes = kChunk * kLine;

#if defined(FD_DSA_HOPPER)

// How 128 threads write the rows of 64 columns of a weight.
//
// A thread writes 16 bytes of a row. A gated row has 32 columns, so a pass writes all 32 rows of a
// chunk. Other rows have 64, and a pass writes 16 of them.
template <bool kGated>
struct ResultLines {
  static constexpr int kRowThreads = kGated ? 4 : 8, kPasses = kGated ? 1 : 2;
  static constexpr int kPassRows = kChunk / kPasses;
  // columns of a warp, and those of a row
  static constexpr int kWarpColumns = kGated ? 8 : 16, kRowColumns = 4 * kWarpColumns;

  uint32_t to, from;  // where this lane's row of a matrix goes, and what this thread writes

  // Args:
  //   lines: shared address of the first line
  //   warp, thread: index in the warpgroup
  __device__ __forceinline__ ResultLines(uint32_t lines, int warp, int lane, int thread)
      : to(lines + warp * (kWarpColumns * 2) +
           (kGated ? lane * kLine : lane % 16 * kLine + lane / 16 * 16)),
        from(lines + thread / kRowThreads * kLine + thread % kRowThreads * 16) {}

  static __device__ __forceinline__ float gated(float gate, float up, float limit) {
    // fminf ignores NaN
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return silu_times(gate, up);
  }

  // Writes this warp's columns of 32 pairs to shared memory.
  //
  // Args:
  //   sums: those of kCount pairs. Value j * 4 + r * 2 + p is that of the thread's column r and of
  //       pair 8 j + lane % 4 * 2 + p.
  //   factor, next_factor: factors of the thread's first column and of its second one
  //   limit: bound of the gate and, at both sides, of the columns that it multiplies
  //   buffer: offset of the lines in bytes
  template <int kCount>
  __device__ __forceinline__ void store_chunk(const float (&sums)[kCount / 2], int chunk,
                                              float factor, float next_factor, float limit,
                                              uint32_t buffer) const {
    uint32_t values[2][4];  // of the first column, or of a gated one, and of the second one
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // the last chunk may have fewer eights of pairs
      const int eight = chunk * 4 + i < kCount / 8 ? chunk * 4 + i : chunk * 4;
      const float* x = sums + eight * 4;
      const float upper[2] = {x[0] * factor, x[1] * factor};
      const float lower[2] = {x[2] * next_factor, x[3] * next_factor};
      values[0][i] = kGated ? hopper::pack_bfloat16(gated(upper[0], lower[0], limit),
                                                    gated(upper[1], lower[1], limit))
                            : hopper::pack_bfloat16(upper[0], upper[1]);
      values[1][i] = hopper::pack_bfloat16(lower[0], lower[1]);
    }
    if constexpr (kGated) {
      hopper::store_matrices_transposed(to + buffer, values[0]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t both[4] = {values[0][2 * half], values[0][2 * half + 1],
                                  values[1][2 * half], values[1][2 * half + 1]};
        hopper::store_matrices_transposed(to + buffer + half * (16 * kLine), both);
      }
    }
  }
};

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::experts
