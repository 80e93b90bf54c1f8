// The grouped GEMM of routed experts in MXFP4 by activations in FP8: the C ABI of its launcher.
#pragma once

#include <cstdint>

// A (token, choice) pair is a row of the result. It is row pair / row_pairs of `x` times the
// transposed weight of the pair's expert.
//
// Layout and size are part of the ABI.
extern "C" struct FdDsaExpertGemmFp4 {
  // e4m3 codes [num_rows, width], 16-byte aligned, and their scales [width / x_group, x_stride]
  const void* x;
  const float* x_scales;
  // peaks of the weight, bytes [num_experts, parts, columns], 16-byte aligned
  const void* peaks;
  // FourBitWeight of fd_dsa/tensor.py of kind "e8m0" and group 32, 16-byte aligned: codes
  // [num_experts, parts, width / 128, columns, 64], e8m0 scales
  // [num_experts, parts, width / 128, columns, 4] and float32 factors [num_experts, parts]. A gated
  // expert has two parts: the gate, then the columns that it multiplies.
  const void* weight;
  const void* weight_scales;
  const float* factors;
  // int32 [num_experts, num_tokens] and [num_experts]: the pairs of each expert and their count
  const int32_t* pairs;
  const int32_t* counts;
  // bfloat16 [pairs, columns], 16-byte aligned, or e4m3 codes of a gated result if `out_scales` is not
  // null. Rows of pairs that are in no list are not written.
  void* out;
  // scales of the codes, float32 [columns / 64, out_stride], powers of two
  float* out_scales;
  // 4 bytes that the launch sets and uses. They may be null with fewer than 64 pairs an expert on
  // average.
  uint32_t* taken;
  int64_t num_rows;
  int64_t x_stride;
  int64_t out_stride;
  // bound of the gate and, at both sides, of the columns that it multiplies
  float limit;
  int32_t num_tokens;
  // rows of `out`. The lists may lack some of these pairs.
  int32_t num_pairs;
  int32_t row_pairs;
  // at most 1024
  int32_t num_experts;
  // a multiple of 128
  int32_t width;
  // a multiple of 64 of a gated expert, else of 128
  int32_t columns;
  // values of a row of `x` that share a scale: 128, or 64 if the expert is not gated. The latter is a
  // gated result for the same lists, and the launch reads these before it waits for `x`.
  int32_t x_group;
  // 1: the result is silu of the gate's columns times the other columns
  int32_t is_gated;
  // 1: a launch with fewer than 64 pairs an expert on average may begin before the previous launch has
  // ended, and waits for it in the kernel
  int32_t starts_early;
};

static_assert(sizeof(FdDsaExpertGemmFp4) == 152, "fd_dsa.ops.expert_gemm_fp4_cuda has the same");

// Fills `out` on Hopper (sm_90) by a kernel, for many pairs after a memset of `taken`. CUDA graphs can
// capture both.
//
// Returns a cudaError_t, 0 = success. The launcher does not allocate or wait. The same input gives
// the same bits.
extern "C" int fd_dsa_expert_gemm_fp4_cuda(const FdDsaExpertGemmFp4* job, void* stream);

// Returns the size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_expert_gemm_fp4_bytes();
