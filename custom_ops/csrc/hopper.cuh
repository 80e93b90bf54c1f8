// Hopper instructions without a C++ name, in inline PTX.
//
// They are shared memory by address, barriers, copies, clusters, conversions and tensor cores.
#ifndef FD_DSA_HOPPER_CUH
#define FD_DSA_HOPPER_CUH

#include <cuda.h>
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

// A matrix of bytes, from which the copy engine takes tiles of 128 rows by 128 bytes.
//
// A kernel has it as a __grid_constant__ parameter.
using TensorMap = CUtensorMap;

// Describes a matrix whose address and width are multiples of 16.
//
// Rows past the last one read as zeros. There is no library to link for the driver's function, so
// it is looked up at run time.
inline cudaError_t make_tile_map(TensorMap& map, const void* at, uint64_t width, uint64_t rows) {
  using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                          const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                          CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                          CUtensorMapFloatOOBfill);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &state);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &state);
#endif
  if (error != cudaSuccess) return error;
  if (state != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {width, rows}, row_bytes[] = {width};
  const cuuint32_t tile[] = {128, 128}, steps[] = {1, 1};
  const CUresult result = reinterpret_cast<Encode*>(found)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(at), sizes, row_bytes, tile, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Copies 128 swizzled rows of 128 bytes from byte `column` and row `row` on, counted by a barrier.
//
// `to` is a multiple of 1024.
__device__ __forceinline__ void copy_tile(uint32_t to, const TensorMap& map, int column, int row,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
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

template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

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

// Multiplies two pairs of float16 values.
__device__ __forceinline__ uint32_t times_halves(uint32_t x, uint32_t y) {
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
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

// ---- tensor cores of a warpgroup

// Returns the offset of 16-byte chunk `chunk` (0 to 7) of a row in an operand, swizzled by 128
// bytes.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// An operand: rows of 128 bytes, 8 rows after 8 rows from a multiple of 1024 on.
//
// A step costs one addition, so GEMMs of 32 cycles follow each other closely. An address has the
// rank of its block in the cluster above its lowest 18 bits.
struct Operand {
  uint32_t low;

  // Returns the descriptor `bytes` further on, which are a multiple of 16.
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
    constexpr uint64_t kSwizzle128 = 1ull << 62, kNextRows = 1024 / 16;
    return kSwizzle128 | kNextRows << 32 | (low + bytes / 16);
  }
};

// Describes an operand whose rows are rows of the result and whose columns are summed over.
//
// A step of 16 columns is 32 bytes.
__device__ __forceinline__ Operand k_major(uint32_t address) {
  return {(address & 0x3ffff) >> 4 | 1u << 16};
}

// Describes an operand whose rows are summed over and whose columns are columns of the result.
//
// In memory, 64 columns are side by side, and the next ones follow `next_columns` bytes later. 16
// rows are 2048 bytes.
__device__ __forceinline__ Operand row_major(uint32_t address, uint32_t next_columns) {
  return {(address & 0x3ffff) >> 4 | next_columns >> 4 << 16};
}

// Makes shared memory that this thread wrote, or waited for, visible to wgmma.
FD_DSA_DO(publish_to_async, "fence.proxy.async.shared::cta;")
FD_DSA_DO(wgmma_fence, "wgmma.fence.sync.aligned;")
FD_DSA_DO(wgmma_commit, "wgmma.commit_group.sync.aligned;")

// Waits until at most this many of the last groups run.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps values in their registers at this point, so that no use of them moves across it.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Keeps words in their registers at this point.
template <int kSteps>
__device__ __forceinline__ void pin(uint32_t (&x)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

// Text and operands of the GEMMs below: `d` has 8 to 128 registers of a thread.
#define FD_DSA_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FD_DSA_16 FD_DSA_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FD_DSA_24 FD_DSA_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FD_DSA_32 FD_DSA_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FD_DSA_36 FD_DSA_32 ", %32, %33, %34, %35"
#define FD_DSA_40 FD_DSA_36 ", %36, %37, %38, %39"
#define FD_DSA_64 FD_DSA_40                                      \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51" \
  ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FD_DSA_128 FD_DSA_64                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103"                                     \
  ", %104, %105, %106, %107, %108, %109, %110, %111"                                 \
  ", %112, %113, %114, %115, %116, %117, %118, %119"                                 \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FD_DSA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FD_DSA_D8(i)                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
      "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FD_DSA_D16(i) FD_DSA_D8(i), FD_DSA_D8(i + 8)
#define FD_DSA_D32(i) FD_DSA_D16(i), FD_DSA_D16(i + 16)
#define FD_DSA_D64 FD_DSA_D32(0), FD_DSA_D32(32)
#define FD_DSA_D128 FD_DSA_D64, FD_DSA_D32(64), FD_DSA_D32(96)
#define FD_DSA_WGMMA_OF(TYPE, SHAPE, D, REST, ADD, ...)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                 \
               "wgmma.mma_async.sync.aligned." SHAPE "k16.f32." TYPE "." TYPE " {" D "}, " REST \
               ";\n}\n" : __VA_ARGS__, "r"(static_cast<int>(add)))
#define FD_DSA_WGMMA(...)                                        \
  if constexpr (kBfloat16) FD_DSA_WGMMA_OF("bf16", __VA_ARGS__); \
  else FD_DSA_WGMMA_OF("f16", __VA_ARGS__)

// Computes d [64 x kColumns] = a [64 x 16] * b [16 x kColumns] (+ d).
//
// a is in registers, 16 rows per warp in the layout of `multiply_add`. b is K-major in shared
// memory. Of each 8 columns of d, a thread has two of row g and two of row g + 8.
template <int kColumns, bool kBfloat16>
__device__ __forceinline__ void wgmma_rows(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                           uint64_t b, bool add) {
  static_assert(kColumns == 16 || kColumns == 32);
  if constexpr (kColumns == 16) {
    FD_DSA_WGMMA("m64n16", FD_DSA_8, "{%8, %9, %10, %11}, %12, p, 1, 1, 0", "%13",
                 FD_DSA_D8(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    FD_DSA_WGMMA("m64n32", FD_DSA_16, "{%16, %17, %18, %19}, %20, p, 1, 1, 0", "%21",
                 FD_DSA_D16(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// Computes d [64 x 64] = a [64 x 16] * b [16 x 64] (+ d), both K-major in shared memory.
template <bool kBfloat16>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  FD_DSA_WGMMA("m64n64", FD_DSA_32, "%32, %33, p, 1, 1, 0, 0", "%34",
               FD_DSA_D32(0) : "l"(a), "l"(b));
}

// Computes d [64 x 128] = a [64 x 32] * b [32 x 128] (+ d) of e4m3 codes, both K-major in shared
// memory.
__device__ __forceinline__ void wgmma_codes(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" FD_DSA_64
      "}, %64, %65, p, 1, 1;\n}\n"
      : FD_DSA_D64
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// Computes d [64 x kColumns] = a [64 x 32] * b [32 x kColumns] (+ d), with a in e5m2 and b in e4m3.
//
// a is in registers. A thread has 4 neighbours of row g of its warp from column 4 t on, those of row
// g + 8, and both again 16 columns later. b is K-major in shared memory. The values of d are as in
// `wgmma_rows`.
template <int kColumns>
__device__ __forceinline__ void wgmma_code_rows(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                                uint64_t b, bool add) {
#define FD_DSA_CODES(SHAPE, D, A, B, ADD, ...)                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                  \
               "wgmma.mma_async.sync.aligned." SHAPE "k32.f32.e5m2.e4m3 {" D "}, {" A "}, " B     \
               ", p, 1, 1;\n}\n" : __VA_ARGS__                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  static_assert(kColumns == 16 || kColumns == 32 || kColumns == 48 || kColumns == 64 ||
                kColumns == 72 || kColumns == 80);
  if constexpr (kColumns == 16) {
    FD_DSA_CODES("m64n16", FD_DSA_8, "%8, %9, %10, %11", "%12", "%13", FD_DSA_D8(0));
  } else if constexpr (kColumns == 32) {
    FD_DSA_CODES("m64n32", FD_DSA_16, "%16, %17, %18, %19", "%20", "%21", FD_DSA_D16(0));
  } else if constexpr (kColumns == 48) {
    FD_DSA_CODES("m64n48", FD_DSA_24, "%24, %25, %26, %27", "%28", "%29", FD_DSA_D16(0),
                 FD_DSA_D8(16));
  } else if constexpr (kColumns == 64) {
    FD_DSA_CODES("m64n64", FD_DSA_32, "%32, %33, %34, %35", "%36", "%37", FD_DSA_D32(0));
  } else if constexpr (kColumns == 72) {
    FD_DSA_CODES("m64n72", FD_DSA_36, "%36, %37, %38, %39", "%40", "%41", FD_DSA_D32(0),
                 FD_DSA_D4(32));
  } else {
    FD_DSA_CODES("m64n80", FD_DSA_40, "%40, %41, %42, %43", "%44", "%45", FD_DSA_D32(0),
                 FD_DSA_D8(32));
  }
}

// Computes d [64 x 256] += a [64 x 16] * b [16 x 256], with a K-major in shared memory and b
// row-major.
template <bool kBfloat16>
__device__ __forceinline__ void wgmma_sums(float (&d)[128], uint64_t a, uint64_t b) {
  constexpr bool add = true;
  FD_DSA_WGMMA("m64n256", FD_DSA_128, "%128, %129, p, 1, 1, 0, 1", "%130",
               FD_DSA_D128 : "l"(a), "l"(b));
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_HOPPER_CUH
