// The grouped GEMM of routed experts in block FP8, for prompts: the C ABI of its launcher.
#pragma once

#include <cstdint>

// A (token, choice) pair is a row of the result: row pair / row_pairs of `x` times the weight of
// the pair's expert, transposed. Values are e4m3 codes times scales, sums float32. Layout and size
// are part of the ABI.
extern "C" struct FdDsaExpertGemm {
  // e4m3 [rows, width], 16-byte aligned
  const void* x;
  // float32 [width / 128, x_stride]: a scale for each 128 values of a row, group by group
  const float* x_scales;
  // e4m3 [num_experts, of an expert, width], 16-byte aligned; of an expert there are `columns`
  // rows, gated twice as many: those of the gate, then those of what it multiplies
  const void* weight;
  // float32 [num_experts, of an expert / 128, width / 128]
  const float* weight_scales;
  // int32 [num_experts, num_tokens] and [num_experts]: the pairs of each expert, and how many
  const int32_t* pairs;
  const int32_t* counts;
  // [pairs, columns], 16-byte aligned; bfloat16, or gated e4m3 of values rounded to bfloat16. Rows
  // of pairs that no list has are not written.
  void* out;
  // gated alone, else null: float32 [columns / 128, out_stride], as `x_scales`
  float* out_scales;
  // 4 bytes that the launch sets and uses
  uint32_t* taken;
  int64_t x_stride;
  int64_t out_stride;
  int32_t num_tokens;
  // pairs that all lists may have together
  int32_t num_pairs;
  int32_t row_pairs;
  // at most 1024
  int32_t num_experts;
  // multiples of 128
  int32_t width;
  int32_t columns;
  // 1: silu of the gate's columns times the others
  int32_t is_gated;
  // 1: scales of the result are powers of two
  int32_t round_scales;
};

static_assert(sizeof(FdDsaExpertGemm) == 120, "fd_dsa.ops.expert_gemm_cuda has the same");

// Fills `out`, on Hopper alone (sm_90), after a memset of `taken`; both can be captured. Returns a
// cudaError_t, 0 = success. Allocates nothing, waits for nothing; the same input gives the same
// bits.
extern "C" int fd_dsa_expert_gemm_cuda(const FdDsaExpertGemm* job, void* stream);

// Size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_expert_gemm_bytes();
