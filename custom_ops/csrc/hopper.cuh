// Hopper instructions without a C++ name, in inline PTX.
//
// They are shared memory by address, barriers, copies, clusters, conversions and a warp's GEMMs.
#ifndef FD_DSA_HOPPER_CUH
#define FD_DSA_HOPPER_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.cuh"

// Set for code of sm_90a. Kernels that need it are empty on other architectures.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FD_DSA_HOPPER 1
#endif

namespace fd_dsa::hopper {

// ---- shared memory

// Returns the block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Functions of one instruction that load from a shared address or store to it.
#define FD_DSA_LOAD(TYPE, NAME, TEXT, ...)                  \
  __device__ __forceinline__ TYPE NAME(uint32_t at) {       \
    TYPE x;                                                 \
    asm volatile(TEXT : __VA_ARGS__ : "r"(at) : "memory"); \
    return x;                                               \
  }
#define FD_DSA_STORE(TYPE, TEXT, ...)                                    \
  __device__ __forceinline__ void store_shared(uint32_t at, TYPE x) {    \
    asm volatile("st.shared." TEXT ::"r"(at), __VA_ARGS__ : "memory"); \
  }
// Functions of one instruction without operands, with a barrier, or with a barrier and a number.
#define FD_DSA_DO(NAME, TEXT) \
  __device__ __forceinline__ void NAME() { asm volatile(TEXT ::: "memory"); }
#define FD_DSA_DO_AT(NAME, TEXT)                          \
  __device__ __forceinline__ void NAME(uint32_t barrier) { \
    asm volatile(TEXT ::"r"(barrier) : "memory");         \
  }
#define FD_DSA_DO_WITH(TYPE, NAME, TEXT)                            \
  __device__ __forceinline__ void NAME(TYPE barrier, TYPE number) { \
    asm volatile(TEXT ::"r"(barrier), "r"(number) : "memory");      \
  }
#define FD_DSA_TWO(KIND) KIND(x.x), KIND(x.y)
#define FD_DSA_FOUR(KIND) FD_DSA_TWO(KIND), KIND(x.z), KIND(x.w)

template <typename T>
__device__ __forceinline__ void store_shared(uint32_t at, T x) {
  static_assert(sizeof(T) == 4);
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(*reinterpret_cast<uint32_t*>(&x))
               : "memory");
}
FD_DSA_STORE(uint16_t, "b16 [%0], %1;", "h"(x))
FD_DSA_STORE(float2, "v2.f32 [%0], {%1, %2};", FD_DSA_TWO("f"))
FD_DSA_STORE(uint4, "v4.b32 [%0], {%1, %2, %3, %4};", FD_DSA_FOUR("r"))
FD_DSA_STORE(float4, "v4.f32 [%0], {%1, %2, %3, %4};", FD_DSA_FOUR("f"))

// Stores 16 bytes if `stores` is true, without a branch.
__device__ __forceinline__ void store_shared_if(bool stores, uint32_t at, uint4 x) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"r"(at),
      FD_DSA_FOUR("r"), "r"(static_cast<int>(stores))
      : "memory");
}

FD_DSA_LOAD(uint32_t, load_shared, "ld.shared.b32 %0, [%1];", "=r"(x))
FD_DSA_LOAD(uint32_t, load_shared_byte, "ld.shared.u8 %0, [%1];", "=r"(x))
FD_DSA_LOAD(float, load_shared_float, "ld.shared.f32 %0, [%1];", "=f"(x))
FD_DSA_LOAD(float2, load_shared_float2, "ld.shared.v2.f32 {%0, %1}, [%2];", FD_DSA_TWO("=f"))
FD_DSA_LOAD(uint2, load_shared_uint2, "ld.shared.v2.b32 {%0, %1}, [%2];", FD_DSA_TWO("=r"))
FD_DSA_LOAD(uint4, load_shared_uint4, "ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];",
            FD_DSA_FOUR("=r"))
FD_DSA_LOAD(float4, load_shared_float4, "ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];",
            FD_DSA_FOUR("=f"))

// ---- barriers

// Initialises a barrier for a number of arrivals.
FD_DSA_DO_WITH(uint32_t, barrier_init, "mbarrier.init.shared::cta.b64 [%0], %1;")

// Publishes initialised barriers to all threads that use them.
FD_DSA_DO(barriers_ready, "fence.mbarrier_init.release.cluster;")
FD_DSA_DO_AT(barrier_arrive, "mbarrier.arrive.shared::cta.b64 _, [%0];")

// Arrivals of a warp that has read or written the data of a barrier.
//
// The first lane arrives after the other lanes' accesses. racecheck does not follow the order from
// one lane to another, so with nvcc -DFD_DSA_EVERY_LANE_ARRIVES each lane arrives by itself.
#if defined(FD_DSA_EVERY_LANE_ARRIVES)
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif

__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  __syncwarp();
  if (kWarpArrivals == 32 || lane == 0) barrier_arrive(barrier);
}

// Arrives, and makes the phase wait for this many bytes of copies.
FD_DSA_DO_WITH(uint32_t, barrier_arrive_expecting,
               "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;")

// Waits for the end of the phase of this parity. A new barrier is past the phase of parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Waits at a barrier of `threads` threads of the block; numbers are 1 to 15.
FD_DSA_DO_WITH(int, named_barrier, "bar.sync %0, %1;")

// Waits like `named_barrier`, for warps that reach the barrier at different places in the code.
FD_DSA_DO_WITH(int, named_barrier_apart, "barrier.sync %0, %1;")

// Arrives at a `named_barrier` of `threads` threads without waiting.
FD_DSA_DO_WITH(int, named_barrier_arrive, "bar.arrive %0, %1;")

// ---- copies

// Copies `bytes` (a multiple of 16) from global to shared memory, counted by a barrier.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Copies `bytes` (a multiple of 16) from shared to global memory.
__device__ __forceinline__ void store_bulk(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

// Asks the L2 cache for the line of 128 bytes at an address.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Waits until the bulk stores of this thread have read shared memory.
FD_DSA_DO(wait_for_bulk_stores, "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;")

// Copies 16 bytes from global to shared memory, or zeros if `read` is false.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(read ? 16 : 0)
               : "memory");
}

// Copies 4 or 8 bytes from global to shared memory, or zeros if `read` is false.
template <int kBytes>
__device__ __forceinline__ void copy_few(uint32_t to, const void* from, bool read) {
  static_assert(kBytes == 4 || kBytes == 8);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from),
               "r"(read ? kBytes : 0), "n"(kBytes)
               : "memory");
}

// Makes this thread arrive at the barrier once its copies by copy_16 and copy_few have ended.
FD_DSA_DO_AT(barrier_arrive_after_copies, "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];")

// Waits for the end of this thread's copies by copy_16.
FD_DSA_DO(wait_for_copies, "cp.async.wait_all;")

// Loads 16 bytes that this block reads once, or zeros if `read` is false.
//
// The load is not marked constant (ld.global.nc), because the compiler moves such loads past the
// next wait, where they are late.
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

// Loads 8 bytes like `load_16`.
__device__ __forceinline__ uint2 load_8(const char* from, bool read) {
  uint2 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
      "@p ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];\n}\n"
      : "=&r"(x.x), "=&r"(x.y)
      : "l"(from), "r"(static_cast<int>(read)));
  return x;
}

// ---- clusters

FD_DSA_DO(cluster_sync,
          "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;")

// Returns the same address in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t address_at_rank(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

FD_DSA_LOAD(float, load_cluster_float, "ld.shared::cluster.f32 %0, [%1];", "=f"(x))
FD_DSA_LOAD(float2, load_cluster_float2, "ld.shared::cluster.v2.f32 {%0, %1}, [%2];",
            FD_DSA_TWO("=f"))
FD_DSA_LOAD(float4, load_cluster_float4, "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];",
            FD_DSA_FOUR("=f"))

// ---- registers of a warpgroup, in a kernel with __launch_bounds__(threads, blocks)

#define FD_DSA_REGISTERS(NAME, CHANGE)                                                \
  template <int kRegisters>                                                           \
  __device__ __forceinline__ void NAME() {                                            \
    asm volatile("setmaxnreg." CHANGE ".sync.aligned.u32 %0;" ::"n"(kRegisters)); \
  }
FD_DSA_REGISTERS(more_registers, "inc")
FD_DSA_REGISTERS(fewer_registers, "dec")

// ---- conversions

// Returns x, and hides its value from the compiler.
//
// The compiler then recomputes values derived from it where they are used, and keeps no registers
// for them elsewhere.
__device__ __forceinline__ int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Converts the codes in the lower or upper half of a word to float16.
template <bool kUpper>
__device__ __forceinline__ uint32_t values_of_codes(uint32_t word) {
#define FD_DSA_VALUES(HALF)                                                                \
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, " HALF ";}" \
      : "=r"(values)                                                                       \
      : "r"(word))
  uint32_t values;
  if constexpr (kUpper) FD_DSA_VALUES("high");
  else FD_DSA_VALUES("low");
  return values;
}

// Converts the codes in the lower or upper half of a word to bfloat16 times a power of two.
//
// `scale` is that power, twice. The bits of a code, moved, are those of its value times 2^-120, for
// denormal numbers too. No multiplication rounds.
template <bool kUpper>
__device__ __forceinline__ uint32_t bfloat16_of_codes(uint32_t word, uint32_t scale) {
  uint32_t both = __byte_perm(word, 0, kUpper ? 0x3424 : 0x1404);
  both = (both & 0x80008000u) | (both >> 4 & 0x07f007f0u);
  asm("mul.rn.bf16x2 %0, %0, %1;\nmul.rn.bf16x2 %0, %0, %2;"
      : "+r"(both)
      : "r"(0x7b807b80u), "r"(scale));
  return both;
}

// Functions of two pairs of float16 or bfloat16 values.
#define FD_DSA_OF_PAIRS(NAME, TEXT)                                    \
  __device__ __forceinline__ uint32_t NAME(uint32_t x, uint32_t y) { \
    asm(TEXT " %0, %0, %1;" : "+r"(x) : "r"(y));                     \
    return x;                                                          \
  }
FD_DSA_OF_PAIRS(times_halves, "mul.rn.f16x2")
FD_DSA_OF_PAIRS(minus_bfloat16, "sub.rn.bf16x2")

// Returns `x & mask | bits` by one instruction. The compiler takes two if both are constants.
__device__ __forceinline__ uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) {
  asm("lop3.b32 %0, %0, %1, %2, 0xea;" : "+r"(x) : "r"(mask), "r"(bits));
  return x;
}

// Multiplies both bfloat16 values of `x` by the one in the lower or upper half of a word.
template <bool kUpper>
__device__ __forceinline__ uint32_t times_bfloat16(uint32_t x, uint32_t word) {
#define FD_DSA_TIMES(HALF)                                                              \
  asm("{.reg .b16 low, high; .reg .b32 both; mov.b32 {low, high}, %1;"                \
      " mov.b32 both, {" HALF ", " HALF "}; mul.rn.bf16x2 %0, %0, both;}"              \
      : "+r"(x)                                                                         \
      : "r"(word))
  if constexpr (kUpper) FD_DSA_TIMES("high");
  else FD_DSA_TIMES("low");
  return x;
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#define FD_DSA_PACK(NAME, TYPE)                                                    \
  __device__ __forceinline__ uint32_t NAME(float low, float high) {                \
    uint32_t both;                                                                 \
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low)); \
    return both;                                                                   \
  }
FD_DSA_PACK(pack_half, "f16")
FD_DSA_PACK(pack_bfloat16, "bf16")

// Converts to e4m3 codes, rounded to nearest even. Numbers above 448 become 448, and NaN 0x7f.
__device__ __forceinline__ uint16_t pack_codes(float low, float high) {
  uint16_t both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
  return both;
}

// Converts half a word of bfloat16 bits to a float.
__device__ __forceinline__ float low_of(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_of(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

// ---- tensor cores of a warp

// Loads four 8x8 matrices of 16-bit values, each transposed or not. Lane i gives the address of row
// i % 8 of matrix i / 8.
#define FD_DSA_LOAD_MATRICES(NAME, TRANSPOSED)                                              \
  __device__ __forceinline__ void NAME(uint32_t (&to)[4], uint32_t row) {                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANSPOSED                                 \
                 ".shared.b16 {%0, %1, %2, %3}, [%4];"                                      \
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])                       \
                 : "r"(row)                                                                 \
                 : "memory");                                                               \
  }
FD_DSA_LOAD_MATRICES(load_matrices, "")
FD_DSA_LOAD_MATRICES(load_matrices_transposed, ".trans")

// Stores four 8x8 matrices of 16-bit values, each transposed or not. Lane i gives the address of row
// i % 8 of matrix i / 8.
#define FD_DSA_STORE_MATRICES(NAME, TRANSPOSED)                                             \
  __device__ __forceinline__ void NAME(uint32_t row, const uint32_t (&from)[4]) {           \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" TRANSPOSED                                 \
                 ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),                          \
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])                     \
                 : "memory");                                                               \
  }
FD_DSA_STORE_MATRICES(store_matrices, "")
FD_DSA_STORE_MATRICES(store_matrices_transposed, ".trans")

// Computes d [16 x 8] += a [16 x 16] * b [16 x 8] in float32, with a and b in float16 or bfloat16.
template <bool kBfloat16>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#define FD_DSA_MMA(TYPE)                                                                     \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (kBfloat16) FD_DSA_MMA("bf16");
  else FD_DSA_MMA("f16");
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_HOPPER_CUH
