// Sparse MLA: shared memory by address, and conversions of numbers.
#ifndef FD_DSA_SPARSE_MLA_VALUES_CUH
#define FD_DSA_SPARSE_MLA_VALUES_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper.cuh"

namespace fd_dsa::hopper {

#if defined(FD_DSA_HOPPER)

// The same number, of which the compiler knows nothing: what follows from it is computed where it
// is used, and holds no registers elsewhere.
__device__ __forceinline__ int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <typename T>
__device__ __forceinline__ void store_shared(uint32_t at, T value) {
  static_assert(sizeof(T) == 4);
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(*reinterpret_cast<uint32_t*>(&value))
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t at, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t at, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t at, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t at, uint16_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}

__device__ __forceinline__ float load_shared_float(uint32_t at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return x;
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t at) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
  return x;
}

__device__ __forceinline__ uint4 load_shared_uint4(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t at) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(at)
               : "memory");
  return x;
}

// float16 values of the codes in the lower, or upper, half of a word.
template <bool kUpper>
__device__ __forceinline__ uint32_t values_of_codes(uint32_t word) {
  uint32_t values;
  if constexpr (kUpper) {
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high;}"
        : "=r"(values)
        : "r"(word));
  } else {
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low;}"
        : "=r"(values)
        : "r"(word));
  }
  return values;
}

// 16 bytes that are read once by this block, zeros instead where `read` is false. Not as constant
// (ld.global.nc): such loads the compiler moves behind the next wait, when they are late.
__device__ __forceinline__ uint4 load_16(const char* from, bool read) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(static_cast<int>(read)));
  return x;
}

// Products of two float16 values.
__device__ __forceinline__ uint32_t times_halves(uint32_t x, uint32_t y) {
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  return x;
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Half a word as a float: bfloat16 bits.
__device__ __forceinline__ float low_of(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_of(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_SPARSE_MLA_VALUES_CUH
