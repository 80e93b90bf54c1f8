// A step's metadata in one launch, for decode-only steps and for those with prefill rows.
//
// What a step costs behind its launch are two trips to memory: the lengths, and the table entries
// whose addresses they give. In a decode-only step a thread takes a row, so that its table entry
// is on its way while the rows before it are summed. With prefill rows a thread takes a token and
// searches its row, so that a long chunk is spread over many blocks. Every block sums the rows
// itself, as there is no barrier inside a launch.
//
// Source: PaddlePaddle/FastDeploy #7367 (positions and slots) and #7598 (windows), whose kernels
// give one thread to a row; the windows here reach back over cached prefixes.
#pragma once

#include "rows.cuh"
#include "step_metadata.h"

namespace fd_dsa {

// rows of a block in a decode-only step, and tokens that it pads
constexpr int kDecodeThreads = 64;
// lengths that a thread asks for before it waits
constexpr int kLengthsAtOnce = 4;
constexpr int kMixedThreads = 256;
constexpr int kMixedRows = 1;
constexpr int kMixedTile = kMixedThreads * kMixedRows;

// Division by the block size: a shift where that is a power of two, as in every server.
template <bool kIsPower>
struct Columns {
  // the size, or its logarithm
  int32_t divisor;

  __device__ __forceinline__ int32_t of(int32_t position) const {
    return kIsPower ? position >> divisor : position / divisor;
  }
};

// Slot of a position whose column and table entry are known.
__device__ __forceinline__ int64_t slot_in(const FdDsaStep& s, int32_t position, int32_t column,
                                           int32_t block) {
  const bool has_block = block >= 0 && block <= s.last_block;
  const int64_t slot = static_cast<int64_t>(block) * s.block_size +
                       (position - column * static_cast<int64_t>(s.block_size));
  return has_block ? slot : -1;
}

// Entry of a row's table, -1 outside of it.
__device__ __forceinline__ int32_t entry_at(const FdDsaStep& s, const int32_t* table,
                                            int32_t position, int32_t column) {
  return position >= 0 && column < s.num_columns ? __ldg(table + column) : -1;
}

__device__ __forceinline__ void write_token(const FdDsaStep& s, int64_t token, int32_t row,
                                            int32_t position, int64_t slot) {
  s.batch_id_per_token[token] = row;
  s.position_ids[token] = position;
  if (s.position_ids_int32 != nullptr) s.position_ids_int32[token] = position;
  s.slot_mapping[token] = slot;
}

__device__ __forceinline__ int32_t length_of(const FdDsaStep& s, int32_t row) {
  return row < s.num_rows ? bounded(__ldg(s.seq_lens_this_time + row), s.num_padded_tokens) : 0;
}

// Lengths of kLengthsAtOnce * kDecodeThreads rows from `base` on, all asked for at once.
struct Lengths {
  int32_t values[kLengthsAtOnce];

  __device__ __forceinline__ Lengths(const FdDsaStep& s, int32_t base) {
#pragma unroll
    for (int i = 0; i < kLengthsAtOnce; ++i) {
      values[i] = length_of(s, base + i * kDecodeThreads + threadIdx.x);
    }
  }

  // Tokens of those rows that lie before `first`, and of all.
  __device__ __forceinline__ Pair sums(int32_t base, int32_t first) const {
    Pair found = {0, 0};
#pragma unroll
    for (int i = 0; i < kLengthsAtOnce; ++i) {
      const bool is_before = base + i * kDecodeThreads < first;
      found = add(found, {is_before ? values[i] : 0, values[i]});
    }
    return found;
  }
};

// Rows [128 * block, 128 * (block + 1)), and padding in the tokens of that range.
template <bool kIsPower>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_step_kernel(const __grid_constant__ FdDsaStep s, const Columns<kIsPower> columns) {
  constexpr int kWarps = kDecodeThreads / kWarp;
  __shared__ Pair of_rows[kWarps];
  __shared__ Pair of_tile[kWarps];
  const int32_t first = blockIdx.x * kDecodeThreads;
  const int32_t row = first + threadIdx.x;
  const int32_t length = length_of(s, row);
  const int32_t cached = row < s.num_rows ? __ldg(s.seq_lens_decoder + row) : 0;
  const Lengths nearest(s, 0);

  const int32_t* table = s.block_tables + row * s.row_stride;
  const int32_t column = columns.of(cached);
  const int32_t last_position = wrapping_add(cached, length - 1);
  const int32_t last_column = columns.of(last_position);
  const int32_t block = length > 0 ? entry_at(s, table, cached, column) : -1;
  // drafts seldom pass into the next block
  const int32_t last_block =
      length > 1 && last_column != column ? entry_at(s, table, last_position, last_column) : block;

  Pair rows = nearest.sums(0, first);
  constexpr int32_t kAtOnce = kLengthsAtOnce * kDecodeThreads;
#pragma unroll 1
  for (int32_t base = kAtOnce; base < s.num_rows; base += kAtOnce) {
    rows = add(rows, Lengths(s, base).sums(base, first));
  }
  rows = {static_cast<int32_t>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(rows.first))),
          static_cast<int32_t>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(rows.second)))};
  if (threadIdx.x % kWarp == 0) of_rows[threadIdx.x / kWarp] = rows;
  const BlockSums<kDecodeThreads> tile({length, 0}, of_tile);
  int32_t start = tile.below.first, num_tokens = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    start = wrapping_add(start, of_rows[warp].first);
    num_tokens = wrapping_add(num_tokens, of_rows[warp].second);
  }

  if (row == 0) s.cu_seqlens_q[0] = 0;
  if (row < s.num_padded_rows) {
    s.cu_seqlens_q[row + 1] = wrapping_add(start, length);
    s.cache_seqlens[row] = length > 0 ? wrapping_add(cached, length) : 0;
  }
  // unrolled, the code would be read from memory for longer than it runs
#pragma unroll 1
  for (int32_t draft = 0; draft < length; ++draft) {
    const int32_t token = wrapping_add(start, draft), position = wrapping_add(cached, draft);
    if (token < 0 || token >= s.num_padded_tokens) continue;
    const int32_t own = columns.of(position);
    const int32_t entry = own == column        ? block
                          : own == last_column ? last_block
                                               : entry_at(s, table, position, own);
    write_token(s, token, row, position, slot_in(s, position, own, entry));
  }
  if (row >= num_tokens && row < s.num_padded_tokens) write_token(s, row, -1, 0, -1);
}

// What the threads of a block know of up to kMixedTile rows.
struct MixedRows {
  // where the row's tokens end
  int32_t ends[kMixedTile];
  // position of a token = its index + shift of its row
  int32_t shifts[kMixedTile];
  // where a prefill row's gathered keys start, -1 for any other row
  int32_t windows[kMixedTile];
};

// Sums a tile of rows behind those that hold `before` tokens and keys; the first block also
// writes what a step has for each row. Returns the sums of the tile.
__device__ __forceinline__ Pair sum_rows(const FdDsaStep& s, int32_t tile, Pair before,
                                         MixedRows& rows, Pair* of_warps) {
  int32_t lengths[kMixedRows], cached[kMixedRows], gathered[kMixedRows];
  bool is_prefill[kMixedRows];
  Pair sums = {0, 0};
#pragma unroll
  for (int i = 0; i < kMixedRows; ++i) {
    const int32_t row = tile + threadIdx.x * kMixedRows + i;
    const bool exists = row < s.num_rows;
    lengths[i] = length_of(s, row);
    cached[i] = exists ? __ldg(s.seq_lens_decoder + row) : 0;
    is_prefill[i] = exists && __ldg(s.seq_lens_encoder + row) > 0;
  }
#pragma unroll
  for (int i = 0; i < kMixedRows; ++i) {
    gathered[i] = is_prefill[i] ? wrapping_add(cached[i], lengths[i]) : lengths[i];
    sums = add(sums, {lengths[i], gathered[i]});
  }
  const BlockSums<kMixedThreads> block(sums, of_warps);
  Pair start = add(before, block.below);
#pragma unroll
  for (int i = 0; i < kMixedRows; ++i) {
    const int slot = threadIdx.x * kMixedRows + i;
    const int32_t row = tile + slot;
    const Pair end = add(start, {lengths[i], gathered[i]});
    rows.ends[slot] = end.first;
    rows.shifts[slot] = wrapping_sub(cached[i], start.first);
    rows.windows[slot] = is_prefill[i] ? start.second : -1;
    if (blockIdx.x == 0 && row < s.num_padded_rows) {
      const bool is_decode = lengths[i] > 0 && !is_prefill[i];
      s.cu_seqlens_q[row + 1] = end.first;
      s.cu_seqlens_kg[row + 1] = end.second;
      s.cache_seqlens[row] = is_decode ? wrapping_add(cached[i], lengths[i]) : 0;
    }
    start = end;
  }
  return block.all;
}

// Tokens [256 * block, 256 * (block + 1)); the first block also writes all rows.
template <bool kIsPower>
__global__ void __launch_bounds__(kMixedThreads)
    mixed_step_kernel(const __grid_constant__ FdDsaStep s, const Columns<kIsPower> columns) {
  __shared__ MixedRows rows;
  __shared__ Pair of_warps[kMixedThreads / kWarp];
  const bool writes_rows = blockIdx.x == 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMixedThreads;
  const int64_t token = first + threadIdx.x;
  int32_t row = -1, position = 0, window = -1;
  if (writes_rows && threadIdx.x == 0) s.cu_seqlens_q[0] = s.cu_seqlens_kg[0] = 0;
  const int32_t num_rows = writes_rows ? s.num_padded_rows : s.num_rows;
  Pair before = {0, 0};
  for (int32_t tile = 0; tile < num_rows; tile += kMixedTile) {
    const Pair sums = sum_rows(s, tile, before, rows, of_warps);
    __syncthreads();
    const int32_t after = wrapping_add(before.first, sums.first);
    if (token >= before.first && token < after) {
      const int found =
          rows_before(rows.ends, min(num_rows - tile, kMixedTile), static_cast<int32_t>(token));
      if (found < kMixedTile) {
        row = tile + found;
        position = wrapping_add(static_cast<int32_t>(token), rows.shifts[found]);
        window = rows.windows[found];
      }
    }
    before = add(before, sums);
    // all tokens of this block lie in the rows so far
    if (!writes_rows && before.first >= first + kMixedThreads) break;
    __syncthreads();
  }
  if (token >= s.num_padded_tokens) return;
  int64_t slot = -1;
  if (row >= 0 && row < s.num_rows) {
    const int32_t column = columns.of(position);
    const int32_t* table = s.block_tables + row * s.row_stride;
    slot = slot_in(s, position, column, entry_at(s, table, position, column));
  }
  write_token(s, token, row, position, slot);
  const int32_t end = wrapping_add(wrapping_add(window, position), 1);
  reinterpret_cast<int2*>(s.indexer_attn_mask_offsets)[token] =
      window >= 0 ? make_int2(window, end) : make_int2(0, 0);
}

template <bool kIsPower>
int launch_step_metadata(const FdDsaStep& step, const Columns<kIsPower> columns, void* stream) {
  const auto config = [=](int32_t count, int tile) {
    const int64_t blocks = (static_cast<int64_t>(count) + tile - 1) / tile;
    return launch_config(static_cast<unsigned>(blocks > 0 ? blocks : 1), tile, stream);
  };
  if (step.indexer_attn_mask_offsets == nullptr) {
    const int32_t most = step.num_padded_rows > step.num_padded_tokens ? step.num_padded_rows
                                                                       : step.num_padded_tokens;
    return launch(config(most, kDecodeThreads), decode_step_kernel<kIsPower>, step, columns);
  }
  if (reinterpret_cast<uintptr_t>(step.indexer_attn_mask_offsets) % sizeof(int2) != 0) {
    return static_cast<int>(cudaErrorMisalignedAddress);
  }
  const auto tokens = config(step.num_padded_tokens, kMixedThreads);
  return launch(tokens, mixed_step_kernel<kIsPower>, step, columns);
}

inline int launch_step_metadata(const FdDsaStep& step, void* stream) {
  const int32_t size = step.block_size;
  if ((size & (size - 1)) != 0) return launch_step_metadata<false>(step, {size}, stream);
  const int32_t shift = __builtin_ctz(static_cast<unsigned>(size));
  return launch_step_metadata<true>(step, {shift}, stream);
}

}  // namespace fd_dsa
