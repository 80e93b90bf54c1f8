// Attention of DeepSeek-V4 over a window and compressed entries: the C ABI of its launcher.
#pragma once

#include <cstdint>

// A token attends to the keys of its window and to entries, which are their own values.
//
// Keys and entries are rows of 512 bfloat16 values, 16-byte aligned, or records, 8-byte aligned. The
// last 64 channels are rotated. A record has e4m3 codes of the other 448, then 64 bfloat16 values,
// and a byte for each 64 codes: the biased exponent of their scale. It has 584 bytes. Layout and
// size of the structure are part of the ABI.
extern "C" struct FdDsaV4Attend {
  // bfloat16 [num_tokens, num_heads * 512], neither normed nor rotated; 16-byte aligned rows that
  // are `q_stride` values apart
  const void* q;
  // keys of the step's tokens [num_tokens]
  const void* keys;
  // older keys [num_rows * ring_rows], by position modulo `ring_rows`
  const void* ring;
  // entries [num_slots], or null for a window alone
  const void* pool;
  // int32 [num_tokens, topk]: selected entries, -1 = none; or null for all entries of a row
  const int32_t* slots;
  // float32 [num_heads]
  const float* sinks;
  // float32 [positions, 64], cos of 32 pairs, then sin; 16-byte aligned
  const float* cos_sin;
  // int32 [num_tokens]: position and row of each token; a row below 0 is padding
  const int32_t* positions;
  const int32_t* rows;
  // int32 [num_rows + 1]: first token of each row
  const int32_t* starts;
  // int32 [num_rows, table_width]: blocks of each row
  const int32_t* block_table;
  // The bfloat16 rows of records, 16-byte aligned: those of `keys` and `ring` with the same numbers,
  // and [num_plain_slots] entries. All four are null without them.
  const void* plain_keys;
  const void* plain_ring;
  const void* plain_pool;
  // int32 [num_rows], not 0 for a row whose tokens read them; its slots and blocks are numbers in
  // `plain_pool`
  const int32_t* is_plain;
  // bfloat16 [num_tokens, num_heads * 512], or null for codes; 16-byte aligned
  void* out;
  // e4m3 [num_tokens, num_heads * 512], 16-byte aligned, and float32 [num_heads * 4, scale_stride],
  // a scale for 128 values of a token, a power of two; null with `out`
  void* codes;
  float* scales;
  int64_t q_stride;
  int64_t scale_stride;
  // term added to the mean square of a query
  float epsilon;
  int32_t num_tokens;
  int32_t num_heads;
  // keys that a token sees with its own
  int32_t window;
  // at least window - 1
  int32_t ring_rows;
  // tokens of an entry, entries of a block
  int32_t ratio;
  int32_t per_block;
  int32_t table_width;
  int32_t topk;
  int32_t num_slots;
  int32_t num_plain_slots;
  // 1: keys and entries are records
  int32_t is_fp8;
  // 1: the launch may begin before the previous one has ended, and waits for it in the kernel
  int32_t starts_early;
};

static_assert(sizeof(FdDsaV4Attend) == 216, "fd_dsa.ops.v4_attend_cuda has the same");

// Fills the result on Hopper (sm_90), and returns a cudaError_t, 0 = success.
//
// One launch with a block for each multiprocessor. The launcher does not allocate or wait. The
// same input gives the same bits, and a token's result does not depend on the others.
extern "C" int fd_dsa_v4_attend_cuda(const FdDsaV4Attend* job, void* stream);

// Returns the size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_v4_attend_bytes();
