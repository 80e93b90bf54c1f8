// The grouped GEMM of routed experts in block FP8, for prompts: the C ABI of its launcher.
#pragma once

#include <cstdint>

// A (token, choice) pair is a row of the result. It is row pair / row_pairs of `x` times the
// transposed weight of the pair's expert.
//
// Values are e4m3 codes times scales, and sums are float32. Layout and size are part of the ABI.
extern "C" struct FdDsaExpertGemm {
  // e4m3 [rows, width], 16-byte aligned
  const void* x;
  // float32 [width / 128, x_stride], a scale per 128 values of a row, ordered by group
  const float* x_scales;
  // e4m3 [num_experts, expert_rows, width], 16-byte aligned. An expert has `columns` rows. A gated
  // expert has twice as many: the rows of the gate, then the rows that it multiplies.
  const void* weight;
  // float32 [num_experts, expert_rows / 128, width / 128]
  const float* weight_scales;
  // int32 [num_experts, num_tokens] and [num_experts]: the pairs of each expert and their count
  const int32_t* pairs;
  const int32_t* counts;
  // [pairs, columns], 16-byte aligned: bfloat16, or e4m3 of values rounded to bfloat16 where gated.
  // Rows of pairs that are in no list are not written.
  void* out;
  // float32 [columns / 128, out_stride] like `x_scales`, or null without a gate
  float* out_scales;
  // 4 bytes that the launch sets and uses
  uint32_t* taken;
  int64_t x_stride;
  int64_t out_stride;
  int32_t num_tokens;
  // total pairs of all lists
  int32_t num_pairs;
  int32_t row_pairs;
  // at most 1024
  int32_t num_experts;
  // multiples of 128
  int32_t width;
  int32_t columns;
  // 1: the result is silu of the gate's columns times the other columns
  int32_t is_gated;
  // 1: scales of the result are powers of two
  int32_t round_scales;
};

static_assert(sizeof(FdDsaExpertGemm) == 120, "fd_dsa.ops.expert_gemm_cuda has the same");

// Fills `out` on Hopper (sm_90) after a memset of `taken`. CUDA graphs can capture both.
//
// Returns a cudaError_t, 0 = success. The launcher does not allocate or wait. The same input gives
// the same bits.
extern "C" int fd_dsa_expert_gemm_cuda(const FdDsaExpertGemm* job, void* stream);

// Returns the size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_expert_gemm_bytes();
