// Top-k, the usual way: few candidates of a row in shared memory, of which the best are found and
// written in ascending position.
#pragma once

#include "topk_block.cuh"

namespace fd_dsa::topk {

// One row of scores. Chunks are 16 bytes at 16-byte addresses; the first `head` floats of chunk 0
// lie before the row.
struct Row {
  const float* scores;
  int64_t token;
  int32_t length, head, num_chunks;

  __device__ __forceinline__ Row(const Rows& rows, int32_t row, int64_t token)
      : scores(rows.logits + row * rows.row_stride), token(token), length(window_of(rows, token)) {
    head = static_cast<int32_t>(reinterpret_cast<uintptr_t>(scores) / sizeof(float) % 4);
    num_chunks = (head + length + 3) / 4;
  }

  __device__ __forceinline__ int32_t first_of(int32_t chunk) const { return chunk * 4 - head; }

  // Scores of a chunk; NaN for what is not of the row.
  __device__ __forceinline__ float4 load(int32_t chunk) const {
    const int32_t first = first_of(chunk);
    if (first >= 0 && first + 4 <= length) {
      return __ldg(reinterpret_cast<const float4*>(scores + first));
    }
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t position = first + i;
      const bool inside = position >= 0 && position < length;
      value[i] = inside ? __ldg(scores + position) : __uint_as_float(0x7fffffffu);
    }
    return make_float4(value[0], value[1], value[2], value[3]);
  }
};

__device__ __forceinline__ float4 load_or_none(const Row& row, int32_t chunk, int32_t end) {
  const float none = __uint_as_float(0x7fffffffu);
  return chunk < end ? row.load(chunk) : make_float4(none, none, none, none);
}

__device__ __forceinline__ uint32_t image_of(float score) {
  return image_of_bits(__float_as_uint(score));
}

// The score of an image; NaN for 0.
__device__ __forceinline__ float score_of(uint32_t image) {
  return __uint_as_float((image >> 31) != 0 ? image ^ 0x80000000u : ~image);
}

// Smallest and largest of the threads' values in all threads.
template <int kThreads>
__device__ __forceinline__ void block_range(Shared& shared, uint32_t& low, uint32_t& high) {
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (lane_id() == 0) {
    shared.warp_low[warp_id()] = low;
    shared.warp_high[warp_id()] = high;
  }
  __syncthreads();
  const bool mine = lane_id() < kThreads / kWarp;
  low = __reduce_min_sync(kAllLanes, mine ? shared.warp_low[lane_id()] : 0xffffffffu);
  high = __reduce_max_sync(kAllLanes, mine ? shared.warp_high[lane_id()] : 0u);
}

// Image of a score that a few more than k of the row's scores exceed, from evenly spaced samples.
//
// The lowest of the best samples of groups bounds the bins from below: so they are narrow where
// the wanted sample is, and few samples are counted.
template <int kThreads, int kLoads>
__device__ uint32_t choose_bound(const Row& row, int32_t k, Shared& shared) {
  constexpr int kMost = kThreads * kLoads;
  const int32_t num_chunks = min(kMost, row.num_chunks);
  uint32_t image[4 * kLoads], best = 0, low = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int32_t index = i * kThreads + threadIdx.x;
    float4 four = make_float4(0, 0, 0, 0);
    if (index < num_chunks) {
      const int64_t spread = static_cast<int64_t>(index) * row.num_chunks / kMost;
      four = row.load(row.num_chunks > kMost ? static_cast<int32_t>(spread) : index);
    }
    const float value[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      image[4 * i + j] = index < num_chunks ? image_of(value[j]) : 0;
      best = max(best, image[4 * i + j]);
      if (index < num_chunks) low = min(low, image[4 * i + j]);
    }
  }
  const float wanted = samples_above(4.0f * num_chunks, row.length, k);
  // groups so small that the worst of their best samples is below the wanted one, or none
  const float size = 2.5f * static_cast<float>(4 * num_chunks) / wanted;
  uint32_t high = best;
  if (size >= 4 * kLoads) {
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      if (size >= 8 * kLoads * lanes) best = max(best, __shfl_xor_sync(kAllLanes, best, lanes));
    }
    low = best == 0 ? 0xffffffffu : best;
  }
  block_range<kThreads>(shared, low, high);
  const int shift = max(0, 32 - __clz(high - low) - kBinBits);
#pragma unroll
  for (int i = 0; i < 4 * kLoads; ++i) {
    if (image[i] >= low) atomicAdd(&shared.bins[(image[i] - low) >> shift], 1u);
  }
  if (threadIdx.x == 0) shared.bin = 0;
  __syncthreads();
  find_bin<kThreads>(shared, static_cast<uint32_t>(wanted));
  // a sample, not an edge of the bin: a plateau of equal scores is then exactly at the bound
#pragma unroll
  for (int i = 0; i < 4 * kLoads; ++i) {
    const bool inside = image[i] >= low && (image[i] - low) >> shift == shared.bin;
    if (inside) atomicMin(&shared.pivot, image[i]);
  }
  __syncthreads();
  return shared.pivot;
}

// Keeps the keys of scores above a bound in `list`, in any order; shared.num_kept counts all.
template <int kThreads, int kUnroll>
__device__ __forceinline__ void keep_above(const Row& row, int32_t begin, int32_t end,
                                           float4 (&tile)[kUnroll], float bound, Shared& shared,
                                           uint64_t* list, uint32_t capacity) {
  uint32_t highest = 0;
  for (; begin < end; begin += kThreads * kUnroll) {
    float4 next[kUnroll];
    const int32_t chunk = begin + threadIdx.x;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      next[u] = load_or_none(row, chunk + (kUnroll + u) * kThreads, end);
    }
    uint32_t count = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      count += is_above(tile[u].x, bound) + is_above(tile[u].y, bound) +
               is_above(tile[u].z, bound) + is_above(tile[u].w, bound);
    }
    const uint32_t prefix = warp_prefix(count);
    uint32_t at = 0;
    if (lane_id() == kWarp - 1 && prefix > 0) at = atomicAdd(&shared.num_kept, prefix);
    at = __shfl_sync(kAllLanes, at, kWarp - 1) + prefix - count;
    if (count > 0) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float value[4] = {tile[u].x, tile[u].y, tile[u].z, tile[u].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (is_above(value[j], bound)) {
            const uint32_t image = image_of(value[j]);
            highest = max(highest, image);
            if (at < capacity) list[at] = ranked(image, row.first_of(chunk + u * kThreads) + j);
            ++at;
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) tile[u] = next[u];
  }
  highest = __reduce_max_sync(kAllLanes, highest);
  if (lane_id() == 0) atomicMax(&shared.highest, highest);
}

// The `need`-th largest of the keys of a list that lie in low..high. Keys differ, as positions do.
template <int kThreads>
__device__ uint64_t find_threshold(Shared& shared, const uint64_t* list, int32_t size,
                                   uint32_t need, uint64_t low, uint64_t high) {
  if (need == static_cast<uint32_t>(size)) return low;
  do {
    const int shift = max(0, 64 - __clzll(high - low) - kBinBits);
    for (int32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint64_t key = list[i];
      if (key >= low && key <= high) {
        atomicAdd(&shared.bins[static_cast<uint32_t>((key - low) >> shift)], 1u);
      }
    }
    __syncthreads();
    find_bin<kThreads>(shared, need);
    need -= shared.above;
    low += static_cast<uint64_t>(shared.bin) << shift;
    const uint64_t end_of_bin = low + ((1ull << shift) - 1);
    if (end_of_bin < high) high = end_of_bin;
    if (shared.inside == need) return low;
  } while (shared.inside > kSmall);
  for (int32_t i = threadIdx.x; i < size; i += kThreads) {
    const uint64_t key = list[i];
    if (key >= low && key <= high) shared.small[atomicAdd(&shared.num_small, 1u)] = key;
  }
  __syncthreads();
  if (threadIdx.x < shared.inside) {
    const uint64_t key = shared.small[threadIdx.x];
    uint32_t better = 0;
    for (uint32_t i = 0; i < shared.inside; ++i) better += shared.small[i] > key;
    if (better == need - 1) shared.threshold = key;
  }
  __syncthreads();
  return shared.threshold;
}

// Bits of a row's positions that one thread turns into output.
struct Part {
  int32_t width, num_words, first;  // bits of a word, words, first position

  template <int kThreads>
  static __device__ __forceinline__ Part of(int32_t length) {
    const int32_t each = (length + kThreads - 1) / kThreads;
    if (each > kWarp) {
      const int32_t num_words = (each + kWarp - 1) / kWarp;
      return {kWarp, num_words, static_cast<int32_t>(threadIdx.x) * num_words * kWarp};
    }
    const int32_t width = each <= 1 ? 1 : 1 << (32 - __clz(each - 1));
    return {width, 1, static_cast<int32_t>(threadIdx.x) * width};
  }

  __device__ __forceinline__ uint32_t word(const uint32_t* bits, int32_t i, int32_t length) const {
    const int32_t position = first + i * kWarp;
    if (position >= length) return 0;
    const uint32_t all = width == kWarp ? 0xffffffffu : (1u << width) - 1;
    return bits[position / kWarp] >> (position % kWarp) & all;
  }
};

// Writes the positions base..base + length - 1 whose bits are set, from entry `done` on.
// Returns how many there are, with `done`.
template <int kThreads>
__device__ int32_t write_bits(const Rows& rows, const Row& row, const uint32_t* bits, int32_t base,
                              int32_t length, int32_t done, uint32_t* ordered, Shared& shared) {
  const Part part = Part::of<kThreads>(length);
  uint32_t count = 0;
  for (int32_t i = 0; i < part.num_words; ++i) count += __popc(part.word(bits, i, length));
  uint32_t at = block_prefix<kThreads>(count, shared);
  if (threadIdx.x == kThreads - 1) shared.above = at + count;
  int32_t* out = rows.out + row.token * rows.k;
  for (int32_t i = 0; i < part.num_words; ++i) {
    for (uint32_t left = part.word(bits, i, length); left != 0; left &= left - 1) {
      const int32_t position = base + part.first + i * kWarp + __ffs(left) - 1;
      if (ordered != nullptr) {
        ordered[at++] = position;
      } else {
        out[done + at++] = entry_of(rows, row.token, position);
      }
    }
  }
  __syncthreads();
  return done + static_cast<int32_t>(shared.above);
}

// Writes the positions of the keys of a list that reach a threshold; there are k of them.
template <int kThreads>
__device__ void write_list(const Rows& rows, const Row& row, uint64_t* list, int32_t size,
                           bool in_order, uint64_t threshold, uint32_t* bits, int32_t num_bits,
                           Shared& shared) {
  int32_t done = 0;
  const bool at_once = row.length <= num_bits;
  for (int32_t base = 0; base < row.length; base += num_bits) {
    const int32_t length = min(num_bits, row.length - base);
    const int32_t rounded = (size + kWarp - 1) / kWarp * kWarp;
    for (int32_t i = threadIdx.x; i < rounded; i += kThreads) {
      const uint64_t key = i < size ? list[i] : 0;
      const int32_t position = position_of(key) - base;
      if (in_order) {
        const unsigned word = __ballot_sync(kAllLanes, key >= threshold);
        if (lane_id() == 0) bits[i / kWarp] = word;
      } else if (key >= threshold && position >= 0 && position < length) {
        atomicOr(&bits[position / kWarp], 1u << (position % kWarp));
      }
    }
    __syncthreads();
    // the list is done with, and has room for k positions
    uint32_t* ordered = at_once ? reinterpret_cast<uint32_t*>(list) : nullptr;
    done = write_bits<kThreads>(rows, row, bits, base, length, done, ordered, shared);
    if (at_once) break;
    for (int32_t i = threadIdx.x; i < num_bits / kWarp; i += kThreads) bits[i] = 0;
    __syncthreads();
  }
  if (!at_once) return;
  int32_t* out = rows.out + row.token * rows.k;
  for (int32_t i = threadIdx.x; i < rows.k; i += kThreads) {
    out[i] = entry_of(rows, row.token, static_cast<int32_t>(reinterpret_cast<uint32_t*>(list)[i]));
  }
}

}  // namespace fd_dsa::topk
