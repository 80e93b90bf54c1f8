// Sparse MLA over selected cache slots: the C ABI of its launchers.
#pragma once

#include <cstdint>

// The attention of each token over the cache slots in its row of `slots`.
//
// out[t, h] = sum over s of softmax_s(softmax_scale * q[t, h] . kv[s]) * kv[s, :512].
//
// Layout and size are part of the ABI.
extern "C" struct FdDsaSparseMla {
  // bfloat16 [num_tokens, num_heads, 576]; absorbed, 16-byte aligned
  const void* q;
  // fp8_ds_mla records [num_slots, 656], or bfloat16 [num_slots, 576]; 16-byte aligned
  const void* cache;
  // int32 [num_tokens, topk]. Entries outside 0..num_slots - 1 may stand anywhere and are skipped.
  const int32_t* slots;
  // float32 or bfloat16 [num_tokens, num_heads, 512], 16-byte aligned; zeros for a row without
  // valid slots
  void* out;
  // float32 [num_tokens, num_heads] or null; natural logarithm, -inf for a row without valid slots
  float* lse;
  float softmax_scale;
  int32_t num_tokens;
  int32_t num_heads;
  int32_t topk;
  int32_t num_slots;
  // 1: out is bfloat16
  int32_t out_is_bfloat16;
  // Blocks that share a token, and its 64 heads if there are more. With 0 the launcher chooses for
  // the device.
  int32_t splits;
  // 1: the cache holds records
  int32_t is_fp8;
  // Dequantized records, 16-byte aligned, or null: 16-bit [dequantized_slots, 576], float16 latents
  // and bfloat16. The kernel for blocks of 64 heads reads them instead of the records and gives the
  // same bits.
  const void* dequantized;
  // int32 [num_slots / block_size]: the block of `dequantized` that holds the slots of a block
  const int32_t* dequantized_blocks;
  // int32 [num_rows]: 1 = the blocks of this row are dequantized
  const int32_t* is_dequantized;
  // int32 [num_tokens]: row of each token; a token outside 0..num_rows - 1 has no row
  const int32_t* batch_id_per_token;
  int32_t num_rows;
  int32_t block_size;
  int32_t dequantized_slots;
  // 1: the launch may begin before the previous one has ended, and waits for it in the kernel
  int32_t starts_early;
};

static_assert(sizeof(FdDsaSparseMla) == 120, "fd_dsa.ops.mla.custom_op has the same");

// Both launchers fill `out` and `lse` on Hopper (sm_90) and return a cudaError_t, 0 = success. They
// do not allocate or wait, and the same input gives the same bits.

// 1 to 32 heads over records; 1 to 16 splits. One launch.
extern "C" int fd_dsa_sparse_mla_narrow_cuda(const FdDsaSparseMla* job, void* stream);

// Blocks of 64 heads over either cache; 1 to 8 or 16 splits. One launch, or two if the tokens do
// not fill the device a whole number of times.
extern "C" int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMla* job, void* stream);

// Returns the size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_sparse_mla_bytes();
