// Top-k: the best of the candidates of a row that a block has in shared memory.
#pragma once

#include "topk_threshold.cuh"

namespace fd_dsa::topk {

// Candidates in shared memory, in any order.
struct List {
  const uint64_t* keys;
  uint32_t size;

  template <int kThreads, typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint64_t key = keys[i];
      visit(static_cast<uint32_t>(key >> 32), position_of(key));
    }
  }
};

// Memory that puts positions in order.
struct Order {
  uint32_t* bits;    // one for each position of a window
  uint32_t* before;  // set bits before each 64
  int32_t num_bits;
  int32_t* chosen;   // k
};

// Counts the set bits before each 64 of a window; returns how many there are.
template <int kThreads>
__device__ __forceinline__ uint32_t count_bits(Shared& shared, const Order& order,
                                               int32_t length) {
  const uint2* words = reinterpret_cast<const uint2*>(order.bits);
  const int32_t num_words = (length + 63) / 64;
  const int32_t each = (num_words + kThreads - 1) / kThreads;
  const int32_t first = min(static_cast<int32_t>(threadIdx.x) * each, num_words);
  const int32_t last = min(first + each, num_words);
  uint32_t count = 0;
#pragma unroll 1
  for (int32_t i = first; i < last; ++i) count += __popc(words[i].x) + __popc(words[i].y);
  const uint32_t prefix = warp_prefix(count);
  if (lane_id() == kWarp - 1) shared.warp_sums[warp_id()] = prefix;
  __syncthreads();
  uint32_t sum = sum_below(shared, warp_id()) + prefix - count;
#pragma unroll 1
  for (int32_t i = first; i < last; ++i) {
    order.before[i] = sum;
    sum += __popc(words[i].x) + __popc(words[i].y);
  }
  const uint32_t all = sum_below(shared, kThreads / kWarp);
  __syncthreads();
  return all;
}

// Writes the positions of the listed candidates that reach a threshold; there are k of them.
template <int kThreads>
__device__ __forceinline__ void write_list(const Job& job, const Row& row, const List& list,
                                           const Order& order, uint64_t threshold,
                                           Shared& shared) {
  uint32_t done = 0;
  for (int32_t base = 0; base < row.length; base += order.num_bits) {
    const uint32_t length = static_cast<uint32_t>(min(order.num_bits, row.length - base));
    const auto each_chosen = [&](auto visit) {
      list.each<kThreads>([&](uint32_t image, int32_t position) {
        const uint32_t bit = static_cast<uint32_t>(position - base);
        if (ranked(image, position) >= threshold && bit < length) visit(bit, position);
      });
    };
    if (base > 0) {
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < order.num_bits / kWarp; i += kThreads) order.bits[i] = 0;
      __syncthreads();
    }
    each_chosen(
        [&](uint32_t bit, int32_t) { atomicOr(&order.bits[bit / kWarp], 1u << bit % kWarp); });
    __syncthreads();
    const uint32_t count = count_bits<kThreads>(shared, order, static_cast<int32_t>(length));
    each_chosen([&](uint32_t bit, int32_t position) {
      const uint2 word = reinterpret_cast<const uint2*>(order.bits)[bit / 64];
      const uint32_t mask = (1u << bit % kWarp) - 1;
      const bool upper = bit % 64 >= kWarp;
      const uint32_t below = upper ? __popc(word.x) + __popc(word.y & mask) : __popc(word.x & mask);
      const uint32_t at = done + order.before[bit / 64] + below;
      // scores that change meanwhile may be chosen wrongly, but are written nowhere else
      if (at < static_cast<uint32_t>(job.rows.k)) order.chosen[at] = position;
    });
    done += count;
    __syncthreads();
  }
  int32_t* out = job.rows.out + row.token * job.rows.k;
#pragma unroll 2
  for (int32_t i = threadIdx.x; i < job.rows.k; i += kThreads) {
    out[i] = entry_at(job, row.token, order.chosen[i]);
  }
}

}  // namespace fd_dsa::topk
