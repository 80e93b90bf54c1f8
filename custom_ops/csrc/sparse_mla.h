// Sparse MLA over selected cache slots: the C ABI of its launchers.
#pragma once

#include <cstdint>

// Attention of each token over the cache slots that its row names:
// out[t, h] = sum over s of softmax_s(softmax_scale * q[t, h] . kv[s]) * kv[s, :512].
// Layout and size are part of the ABI.
extern "C" struct FdDsaSparseMla {
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
  // 1: out is bfloat16
  int32_t out_is_bfloat16;
  // blocks that share a token, and its 64 heads where there are more; 0: as suits the device
  int32_t splits;
  // 1: the cache holds records
  int32_t is_fp8;
  // Records that were dequantized before, 16-byte aligned, or null: 16-bit [dequantized_slots, 576],
  // float16 latents and bfloat16. The kernel for blocks of 64 heads reads them instead of the
  // records, and gives the same bits.
  const void* dequantized;
  // int32 [num_slots / block_size]: where the slots of a block are in `dequantized`, in blocks
  const int32_t* dequantized_blocks;
  // int32 [num_rows]: 1 = the blocks of this row were dequantized
  const int32_t* is_dequantized;
  // int32 [num_tokens]: row of each token; outside 0..num_rows - 1 = none
  const int32_t* batch_id_per_token;
  int32_t num_rows;
  int32_t block_size;
  int32_t dequantized_slots;
};

static_assert(sizeof(FdDsaSparseMla) == 120, "fd_dsa.ops.mla.custom_op has the same");

// Both fill `out` and `lse`, on Hopper alone (sm_90), and return a cudaError_t, 0 = success. They
// allocate nothing, wait for nothing; the same input gives the same bits.

// 1 to 32 heads over records; 1 to 16 splits. One launch.
extern "C" int fd_dsa_sparse_mla_narrow_cuda(const FdDsaSparseMla* job, void* stream);

// Blocks of 64 heads over either cache; 1 to 8 or 16 splits. One launch, or two where tokens do not
// fill the device whole times.
extern "C" int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMla* job, void* stream);

// Size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_sparse_mla_bytes();
