// Top-k: the order of scores, and what threads of a block or of a cluster of blocks share.
#pragma once

#include "common.cuh"
#include "topk_sizes.h"

namespace fd_dsa::topk {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
// candidates that are ranked by comparing each with all others
constexpr int kSmall = 64;

// Shared memory of a block, in front of the candidates and the bit map.
struct alignas(16) Shared {
  uint32_t bins[kBins];
  uint64_t small[kSmall];
  uint64_t threshold;
  uint32_t warp_sums[kWarp], warp_low[kWarp], warp_high[kWarp];
  // what find_bin found: the bin, entries above it, entries in it
  uint32_t bin, above, inside;
  uint32_t num_small, num_kept, highest, pivot;
  // of each block of the cluster
  uint32_t kept_of[kMaxCluster], highest_of[kMaxCluster];
  uint32_t better_of[kMaxCluster], equal_of[kMaxCluster];
};

// a > b, false for NaN; denormal numbers count whatever flags the compiler got.
__device__ __forceinline__ uint32_t is_above(float a, float b) {
  uint32_t result;
  asm("{.reg .pred p; setp.gt.f32 p, %1, %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(result)
      : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1; }

// Sum of the values of this lane and the lanes below it.
__device__ __forceinline__ uint32_t warp_prefix(uint32_t value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step) value += below;
  }
  return value;
}

// Sum of the values of all threads below this one. The caller has a barrier before the next use.
template <int kThreads>
__device__ __forceinline__ uint32_t block_prefix(uint32_t value, Shared& shared) {
  const uint32_t prefix = warp_prefix(value);
  if (lane_id() == kWarp - 1) shared.warp_sums[warp_id()] = prefix;
  __syncthreads();
  const uint32_t other = lane_id() < warp_id() ? shared.warp_sums[lane_id()] : 0;
  return __reduce_add_sync(kAllLanes, other) + prefix - value;
}

// Finds the bin of the `need`-th entry from the top, and empties the bins. Starts behind a barrier
// and ends with one; leaves shared.bin alone where there are fewer entries.
template <int kThreads>
__device__ __forceinline__ void find_bin(Shared& shared, uint32_t need) {
  constexpr int kOwn = kBins / kThreads;
  uint32_t* own = shared.bins + kBins - (threadIdx.x + 1) * kOwn;
  uint32_t count[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    count[i] = own[i];
    own[i] = 0;
    sum += count[i];
  }
  uint32_t above = block_prefix<kThreads>(sum, shared);
  if (above < need && need <= above + sum) {
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
      if (above < need && need <= above + count[i]) {
        shared.bin = kBins - (threadIdx.x + 1) * kOwn + i;
        shared.above = above;
        shared.inside = count[i];
      }
      above += count[i];
    }
  }
  __syncthreads();
}

// Blocks that work on one row: a cluster of sm_90 and later, or one block.
template <bool kOn>
struct Cluster {
  static __device__ __forceinline__ uint32_t rank() { return 0; }
  static __device__ __forceinline__ uint32_t size() { return 1; }
  static __device__ __forceinline__ void arrive() {}
  static __device__ __forceinline__ void wait() { __syncthreads(); }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  template <typename T>
  static __device__ __forceinline__ void store(T* at, uint32_t, T value) {
    *at = value;
  }
  static __device__ __forceinline__ uint32_t load(const uint32_t* at, uint32_t) { return *at; }
  static __device__ __forceinline__ void add(uint32_t* at, uint32_t, uint32_t value) {
    atomicAdd(at, value);
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <>
struct Cluster<true> {
  static __device__ __forceinline__ uint32_t rank() {
    uint32_t value;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
    return value;
  }
  static __device__ __forceinline__ uint32_t size() {
    uint32_t value;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(value));
    return value;
  }
  static __device__ __forceinline__ void arrive() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  }
  static __device__ __forceinline__ void wait() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }
  static __device__ __forceinline__ void sync() {
    arrive();
    wait();
  }
  // The address, in the block of a rank, of what lies at `at` in this one.
  static __device__ __forceinline__ uint32_t there(const void* at, uint32_t rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(rank));
    return address;
  }
  static __device__ __forceinline__ void store(uint32_t* at, uint32_t rank, uint32_t value) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there(at, rank)), "r"(value) : "memory");
  }
  static __device__ __forceinline__ void store(uint64_t* at, uint32_t rank, uint64_t value) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(there(at, rank)), "l"(value) : "memory");
  }
  static __device__ __forceinline__ uint32_t load(const uint32_t* at, uint32_t rank) {
    uint32_t value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(value)
                 : "r"(there(at, rank))
                 : "memory");
    return value;
  }
  static __device__ __forceinline__ void add(uint32_t* at, uint32_t rank, uint32_t value) {
    asm volatile("red.shared::cluster.add.u32 [%0], %1;" ::"r"(there(at, rank)), "r"(value)
                 : "memory");
  }
};
#endif

}  // namespace fd_dsa::topk
