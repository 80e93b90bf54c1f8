// Top-k: the k-th best of the candidates of a row, wherever a block holds them.
#pragma once

#include "topk_row.cuh"

namespace fd_dsa::topk {

// Counts values in low..high by their leading digit below the common ones and keeps to the digit
// of the `need`-th from the top. `each(visit)` calls visit(value) for the thread's own values.
template <int kThreads, typename Each>
__device__ __forceinline__ void narrow(Shared& shared, Each each, uint32_t& need, uint32_t& low,
                                       uint32_t& high) {
  const uint32_t start = low, range = high - low;
  const int shift = max(0, 32 - __clz(range) - kBinBits);
  each([&](uint32_t value) {
    if (value - start <= range) atomicAdd(&shared.bins[(value - start) >> shift], 1u);
  });
  __syncthreads();
  find_bin<kThreads>(shared, need);
  need -= shared.above;
  low += shared.bin << shift;
  // the bin may reach past the largest number
  high = low + min(high - low, (1u << shift) - 1);
}

// The `need`-th largest of at most kSmall candidates in first..last.
template <typename Each>
__device__ __forceinline__ uint64_t rank_few(Shared& shared, Each each, uint32_t need,
                                             uint64_t first, uint64_t last) {
  each([&](uint32_t image, int32_t position) {
    const uint64_t key = ranked(image, position);
    if (key < first || key > last) return;
    const uint32_t at = atomicAdd(&shared.num_small, 1u);
    if (at < kSmall) shared.small[at] = key;
  });
  __syncthreads();
  if (threadIdx.x < shared.inside) {
    const uint64_t key = shared.small[threadIdx.x];
    uint32_t better = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < shared.inside; ++i) better += shared.small[i] > key;
    if (better == need - 1) shared.threshold = key;
  }
  __syncthreads();
  return shared.threshold;
}

// The k-th best of the candidates that all threads hold, or what lies between it and the next one:
// the chosen ones are those whose key is not less.
//
// `each(visit)` calls visit(image, position) for the thread's own candidates, of which all threads
// together have at least `need`, with images in low..high and positions below `length`.
template <int kThreads, typename Each>
__device__ uint64_t find_threshold(Shared& shared, Each each, uint32_t need, uint32_t low,
                                   uint32_t high, int32_t length) {
  do {
    narrow<kThreads>(
        shared, [&](auto visit) { each([&](uint32_t image, int32_t) { visit(image); }); }, need,
        low, high);
    if (shared.inside == need) return static_cast<uint64_t>(low) << 32;
  } while (shared.inside > kSmall && low < high);
  // complements of positions: the lowest first among equal scores
  uint32_t first = ~static_cast<uint32_t>(length - 1), last = 0xffffffffu;
  while (shared.inside > kSmall) {
    const auto of_equal = [&](auto visit) {
      each([&](uint32_t image, int32_t position) {
        if (image == low) visit(~static_cast<uint32_t>(position));
      });
    };
    narrow<kThreads>(shared, of_equal, need, first, last);
    if (shared.inside == need) return static_cast<uint64_t>(low) << 32 | first;
  }
  return rank_few(shared, each, need, static_cast<uint64_t>(low) << 32 | first,
                  static_cast<uint64_t>(high) << 32 | last);
}

}  // namespace fd_dsa::topk
