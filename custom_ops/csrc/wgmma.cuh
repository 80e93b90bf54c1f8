// Tensor cores of a warpgroup of Hopper (wgmma), in inline PTX.
#ifndef FD_DSA_WGMMA_CUH
#define FD_DSA_WGMMA_CUH

#include "hopper.cuh"

namespace fd_dsa::hopper {

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

// Text and operands of the GEMMs below: `d` has 4 to 128 registers of a thread.
#define FD_DSA_4 "%0, %1, %2, %3"
#define FD_DSA_8 FD_DSA_4 ", %4, %5, %6, %7"
#define FD_DSA_16 FD_DSA_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FD_DSA_20 FD_DSA_16 ", %16, %17, %18, %19"
#define FD_DSA_24 FD_DSA_20 ", %20, %21, %22, %23"
#define FD_DSA_28 FD_DSA_24 ", %24, %25, %26, %27"
#define FD_DSA_32 FD_DSA_28 ", %28, %29, %30, %31"
#define FD_DSA_36 FD_DSA_32 ", %32, %33, %34, %35"
#define FD_DSA_40 FD_DSA_36 ", %36, %37, %38, %39"
#define FD_DSA_48 FD_DSA_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FD_DSA_56 FD_DSA_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FD_DSA_64 FD_DSA_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
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

// Text and operands of GEMMs whose first operand a is in registers. D is the count of values of d,
// and the number of a's first register. The others follow it.
#define FD_DSA_ROWS_OF(N, D, A1, A2, A3, B, ADD, TYPES, FLAGS, ...)                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                 \
               "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" FD_DSA_##D "}, {%" #D ", %" #A1 \
               ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1" FLAGS ";\n}\n"                          \
               : __VA_ARGS__                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define FD_DSA_ROWS(TYPES, FLAGS)                                                            \
  if constexpr (kColumns == 8)                                                               \
    FD_DSA_ROWS_OF(8, 4, 5, 6, 7, 8, 9, TYPES, FLAGS, FD_DSA_D4(0));                         \
  else if constexpr (kColumns == 16)                                                         \
    FD_DSA_ROWS_OF(16, 8, 9, 10, 11, 12, 13, TYPES, FLAGS, FD_DSA_D8(0));                    \
  else if constexpr (kColumns == 32)                                                         \
    FD_DSA_ROWS_OF(32, 16, 17, 18, 19, 20, 21, TYPES, FLAGS, FD_DSA_D16(0));                 \
  else if constexpr (kColumns == 40)                                                         \
    FD_DSA_ROWS_OF(40, 20, 21, 22, 23, 24, 25, TYPES, FLAGS, FD_DSA_D16(0), FD_DSA_D4(16));  \
  else if constexpr (kColumns == 48)                                                         \
    FD_DSA_ROWS_OF(48, 24, 25, 26, 27, 28, 29, TYPES, FLAGS, FD_DSA_D16(0), FD_DSA_D8(16));  \
  else if constexpr (kColumns == 56)                                                         \
    FD_DSA_ROWS_OF(56, 28, 29, 30, 31, 32, 33,                                               \
                   TYPES, FLAGS, FD_DSA_D16(0), FD_DSA_D8(16), FD_DSA_D4(24));               \
  else if constexpr (kColumns == 64)                                                         \
    FD_DSA_ROWS_OF(64, 32, 33, 34, 35, 36, 37, TYPES, FLAGS, FD_DSA_D32(0));                 \
  else if constexpr (kColumns == 72)                                                         \
    FD_DSA_ROWS_OF(72, 36, 37, 38, 39, 40, 41, TYPES, FLAGS, FD_DSA_D32(0), FD_DSA_D4(32));  \
  else if constexpr (kColumns == 80)                                                         \
    FD_DSA_ROWS_OF(80, 40, 41, 42, 43, 44, 45, TYPES, FLAGS, FD_DSA_D32(0), FD_DSA_D8(32));  \
  else if constexpr (kColumns == 96)                                                         \
    FD_DSA_ROWS_OF(96, 48, 49, 50, 51, 52, 53, TYPES, FLAGS, FD_DSA_D32(0), FD_DSA_D16(32)); \
  else if constexpr (kColumns == 112)                                                        \
    FD_DSA_ROWS_OF(112, 56, 57, 58, 59, 60, 61,                                              \
                   TYPES, FLAGS, FD_DSA_D32(0), FD_DSA_D16(32), FD_DSA_D8(48));              \
  else if constexpr (kColumns == 128)                                                        \
    FD_DSA_ROWS_OF(128, 64, 65, 66, 67, 68, 69, TYPES, FLAGS, FD_DSA_D64);                   \
  else static_assert(kColumns == 0);

// Computes d [64 x kColumns] = a [64 x 16] * b [16 x kColumns] (+ d).
//
// a is in registers, 16 rows per warp in the layout of `multiply_add`. b is K-major in shared
// memory. Of each 8 columns of d, a thread has two of row g and two of row g + 8.
template <int kColumns, bool kBfloat16>
__device__ __forceinline__ void wgmma_rows(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                           uint64_t b, bool add) {
  if constexpr (kBfloat16) {
    FD_DSA_ROWS("k16.f32.bf16.bf16", ", 0")
  } else {
    FD_DSA_ROWS("k16.f32.f16.f16", ", 0")
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
  FD_DSA_ROWS("k32.f32.e5m2.e4m3", "")
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

#endif  // FD_DSA_WGMMA_CUH
