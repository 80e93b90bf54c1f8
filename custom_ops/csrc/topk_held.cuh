// Top-k: a short row, which the registers of a block hold.
#pragma once

#include "topk_threshold.cuh"

namespace fd_dsa::topk {

// A short row: its scores stay in registers, every warp's in a stretch of their own.
template <int kThreads, int kUnroll>
struct Held {
  static constexpr int32_t kMostChunks = kThreads * kUnroll;

  uint32_t image[4 * kUnroll];
  uint32_t present;  // a bit for each image that is of the row
  int32_t first;     // position of the first

  __device__ __forceinline__ explicit Held(const Row& row) : present(0) {
    // chunks from the one that the row begins in, so that all of it is in some chunk
    const int32_t head = row.lead == 0 ? 0 : 4 - row.lead;
    const int32_t chunk = warp_id() * kUnroll * kWarp + lane_id();
    float4 four[kUnroll];
    first = chunk * 4 - head;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) four[u] = load(row, position(4 * u));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      image[4 * u] = image_of(four[u].x);
      image[4 * u + 1] = image_of(four[u].y);
      image[4 * u + 2] = image_of(four[u].z);
      image[4 * u + 3] = image_of(four[u].w);
    }
#pragma unroll
    for (int i = 0; i < 4 * kUnroll; ++i) {
      if (static_cast<uint32_t>(position(i)) < static_cast<uint32_t>(row.length)) {
        present |= 1u << i;
      }
    }
  }

  // Four scores from a position on; anything for what is not of the row.
  static __device__ __forceinline__ float4 load(const Row& row, int32_t begin) {
    if (begin >= 0 && begin + 4 <= row.length) {
      return __ldg(reinterpret_cast<const float4*>(row.scores + begin));
    }
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = begin + i >= 0 && begin + i < row.length;
      value[i] = inside ? __ldg(row.scores + begin + i) : 0.0f;
    }
    return make_float4(value[0], value[1], value[2], value[3]);
  }

  // Position of an image, also of one that is not of the row.
  __device__ __forceinline__ int32_t position(int i) const {
    return first + i / 4 * (4 * kWarp) + i % 4;
  }

  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < 4 * kUnroll; ++i) {
      if ((present >> i & 1u) != 0) visit(image[i], position(i));
    }
  }
};

// Writes the positions of the held scores that reach a threshold; there are k of them.
template <int kThreads, int kUnroll>
__device__ __forceinline__ void write_held(const Job& job, const Row& row,
                                           const Held<kThreads, kUnroll>& held, uint64_t threshold,
                                           Shared& shared) {
  uint32_t chosen = 0, before[kUnroll], sum = 0;
#pragma unroll
  for (int i = 0; i < 4 * kUnroll; ++i) {
    if (ranked(held.image[i], held.position(i)) >= threshold) chosen |= 1u << i;
  }
  chosen &= held.present;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t count = __popc(chosen >> (4 * u) & 15u);
    const uint32_t prefix = warp_prefix(count);
    before[u] = sum + prefix - count;
    sum += __shfl_sync(kAllLanes, prefix, kWarp - 1);
  }
  if (lane_id() == 0) shared.warp_sums[warp_id()] = sum;
  __syncthreads();
  const uint32_t start = sum_below(shared, warp_id());
  int32_t* out = job.rows.out + row.token * job.rows.k;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    uint32_t at = start + before[u];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if ((chosen >> (4 * u + j) & 1u) != 0) {
        out[at++] = entry_at(job, row.token, held.position(4 * u + j));
      }
    }
  }
}

// A row that the registers of a block hold.
template <int kThreads, int kUnroll>
__device__ __forceinline__ void choose_held(const Job& job, const Row& row, Shared& shared) {
  const Held<kThreads, kUnroll> held(row);
  uint32_t low = 0xffffffffu, high = 0;
  held.each([&](uint32_t image, int32_t) {
    low = min(low, image);
    high = max(high, image);
  });
  block_range<kThreads>(shared, low, high);
  const auto each = [&](auto visit) { held.each(visit); };
  const uint32_t k = static_cast<uint32_t>(job.rows.k);
  const uint64_t threshold = find_threshold<kThreads>(shared, each, k, low, high, row.length);
  write_held(job, row, held, threshold, shared);
}

}  // namespace fd_dsa::topk
