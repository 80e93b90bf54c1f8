// The grouped GEMM of routed experts in four bits by activations in bfloat16: the C ABI of its
// launcher.
#pragma once

#include <cstdint>

// A (token, choice) pair is a row of the result. It is row pair / row_pairs of `x` times the
// transposed weight of the pair's expert.
//
// Layout and size are part of the ABI.
extern "C" struct FdDsaExpertGemmW4a16 {
  // bfloat16 [num_rows, width], 16-byte aligned
  const void* x;
  // FourBitWeight of fd_dsa/tensor.py of kind "e4m3" and group 16, or of kind "int4" and group 128,
  // 16-byte aligned: codes [num_experts, parts, width / 128, columns, 64], and scales
  // [num_experts, parts, width / 128, columns] of 8 or 4 bytes. A gated expert has two parts: the
  // gate, then the columns that it multiplies.
  const void* weight;
  const void* weight_scales;
  // float32 [num_experts, parts], or null for integers
  const float* factors;
  // int32 [num_experts, num_tokens] and [num_experts]: the pairs of each expert and their count
  const int32_t* pairs;
  const int32_t* counts;
  // bfloat16 [pairs, columns], 16-byte aligned. Rows of pairs that are in no list are not written.
  void* out;
  // 4 bytes that the launch sets and uses. They may be null with fewer than 64 pairs an expert on
  // average.
  uint32_t* taken;
  int64_t num_rows;
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
  // a multiple of 128 of a gated expert, else of 256
  int32_t columns;
  // 1: the result is silu of the gate's columns times the other columns
  int32_t is_gated;
  // 1: codes are integers
  int32_t is_integer;
  // 1: a launch without `taken` may begin before the previous launch has ended, and waits for it in
  // the kernel
  int32_t starts_early;
};

static_assert(sizeof(FdDsaExpertGemmW4a16) == 112, "fd_dsa.ops.expert_gemm_w4a16_cuda has the same");

// Fills `out` on Hopper (sm_90) by a kernel, after a memset of `taken` if there is one. CUDA graphs
// can capture both.
//
// Returns a cudaError_t, 0 = success. The launcher does not allocate or wait. The same input gives
// the same bits.
extern "C" int fd_dsa_expert_gemm_w4a16_cuda(const FdDsaExpertGemmW4a16* job, void* stream);

// Returns the size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_expert_gemm_w4a16_bytes();
