// Hardware features without a C++ name, in inline PTX.
//
// They are clusters, memory of other ranks, the clock and conversions.
#ifndef FD_DSA_PTX_CUH
#define FD_DSA_PTX_CUH

#include "common.cuh"

namespace fd_dsa {

// Returns the block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Sets a bit of `mask` where a > b, and leaves it clear for NaN.
//
// Denormal numbers count with any flags of the compiler.
template <int kBit>
__device__ __forceinline__ void mark_above(float a, float b, uint32_t& mask) {
  asm("{.reg .pred p; setp.gt.f32 p, %1, %2; @p or.b32 %0, %0, %3;}"
      : "+r"(mask)
      : "f"(a), "f"(b), "n"(1u << kBit));
}

// The blocks that work on one row: a cluster on sm_90 and later, else one block.
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
// In functions with a rank, `at` stands for the same offset in the memory of that block.
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

// Reads a vector of which each 32-bit word is complete, because the hardware accesses a vector word
// by word.
__device__ __forceinline__ uint4 load_shared_rank(const uint4* at) {
  uint4 x;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_shared_rank(uint4* at, uint4 x) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.x),
               "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// The pause between two polls, which only the emulated version needs.
__device__ __forceinline__ void poll_again() {}

// Ends the launch and all work of this process on the device. The host can read `at`.
__device__ __forceinline__ void fail(uint32_t* at, uint32_t value) {
  *reinterpret_cast<volatile uint32_t*>(at) = value;
  __threadfence_system();
  __trap();
}

// Packs two numbers as bfloat16, rounded to nearest even, with NaN as 0x7fff.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

}  // namespace fd_dsa

#endif  // FD_DSA_PTX_CUH
