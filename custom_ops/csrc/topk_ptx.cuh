// Top-k: what has no name in C++, and so is asked of the hardware in its own language.
#ifndef FD_DSA_TOPK_PTX_CUH
#define FD_DSA_TOPK_PTX_CUH

#include "common.cuh"

namespace fd_dsa::topk {

// A block's shared memory, as much of it as the launch asked for.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Sets a bit of `mask` where a > b, which is false for NaN; denormal numbers count whatever flags
// the compiler got.
template <int kBit>
__device__ __forceinline__ void mark_above(float a, float b, uint32_t& mask) {
  asm("{.reg .pred p; setp.gt.f32 p, %1, %2; @p or.b32 %0, %0, %3;}"
      : "+r"(mask)
      : "f"(a), "f"(b), "n"(1u << kBit));
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
  static __device__ __forceinline__ uint32_t add(uint32_t* at, uint32_t, uint32_t value) {
    return atomicAdd(at, value);
  }
  static __device__ __forceinline__ void max(uint32_t* at, uint32_t, uint32_t value) {
    atomicMax(at, value);
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Where a function takes a rank, `at` stands for the same place in the memory of that block.
template <>
struct Cluster<true> {
#define FD_DSA_REGISTER(NAME, REGISTER)                    \
  static __device__ __forceinline__ uint32_t NAME() {      \
    uint32_t value;                                        \
    asm("mov.u32 %0, %%" REGISTER ";" : "=r"(value)); \
    return value;                                          \
  }
  FD_DSA_REGISTER(rank, "cluster_ctarank")
  FD_DSA_REGISTER(size, "cluster_nctarank")
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
  static __device__ __forceinline__ uint32_t add(uint32_t* at, uint32_t rank, uint32_t value) {
    uint32_t before;
    asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(there(at, rank)), "r"(value)
                 : "memory");
    return before;
  }
  static __device__ __forceinline__ void max(uint32_t* at, uint32_t rank, uint32_t value) {
    asm volatile("red.shared::cluster.max.u32 [%0], %1;" ::"r"(there(at, rank)), "r"(value)
                 : "memory");
  }
};
#endif

}  // namespace fd_dsa::topk

#endif  // FD_DSA_TOPK_PTX_CUH
