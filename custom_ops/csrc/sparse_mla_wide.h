// Sparse MLA for many heads: the C ABI of the launcher.
#pragma once

#include <cstdint>

// Attention of each token over the cache slots that its row names:
// out[t, h] = sum over s of softmax_s(softmax_scale * q[t, h] . kv[s]) * kv[s, :512].
// Layout and size are part of the ABI.
extern "C" struct FdDsaSparseMlaWide {
  // bfloat16 [num_tokens, num_heads, 576]; absorbed, 16-byte aligned
  const void* q;
  // fp8_ds_mla records [num_slots, 656], or bfloat16 [num_slots, 576]; 16-byte aligned
  const void* cache;
  // int32 [num_tokens, topk]; outside 0..num_slots - 1 = none, at any place; never read
  const int32_t* slots;
  // float32 or bfloat16 [num_tokens, num_heads, 512], 16-byte aligned; zeros where a row names none
  void* out;
  // float32 [num_tokens, num_heads] or null; natural logarithm, -inf where a row names none
  float* lse;
  float softmax_scale;
  int32_t num_tokens;
  int32_t num_heads;
  int32_t topk;
  int32_t num_slots;
  // 1: the cache holds records
  int32_t is_fp8;
  // 1: out is bfloat16
  int32_t out_is_bfloat16;
  // blocks that share a token and 64 heads: 1, 2, 4, 8 or 16; 0: as fits the device
  int32_t splits;
};

// Fills `out` and `lse` in one launch, on Hopper alone (sm_90). Returns a cudaError_t, 0 = success.
// Allocates nothing, waits for nothing; the same input gives the same bits.
extern "C" int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMlaWide* job, void* stream);
