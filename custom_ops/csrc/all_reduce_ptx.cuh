// All-reduce: what has no name in C++. Memory of other ranks, the clock, conversions.
#ifndef FD_DSA_ALL_REDUCE_PTX_CUH
#define FD_DSA_ALL_REDUCE_PTX_CUH

#include "common.cuh"

namespace fd_dsa::peers {

// A poll finds each 32-bit word whole: a vector is an access for each of its elements.
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

// Between two polls.
__device__ __forceinline__ void poll_again() {}

// Ends the launch, and with it all work of this process on the device; the host can read `at`.
__device__ __forceinline__ void fail(uint32_t* at, uint32_t value) {
  *reinterpret_cast<volatile uint32_t*>(at) = value;
  __threadfence_system();
  __trap();
}

// See fd_dsa.triton_runtime.early.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Two numbers as bfloat16, rounded to nearest even; NaN is 0x7fff.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Two numbers as e4m3: past 448 the largest, NaN 0x7f.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  uint16_t both = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
#endif
  return both;
}

}  // namespace fd_dsa::peers

#endif  // FD_DSA_ALL_REDUCE_PTX_CUH
