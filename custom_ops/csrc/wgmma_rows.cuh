// Hopper's tensor cores with few columns: rows in registers, columns in shared memory.
#ifndef FD_DSA_WGMMA_ROWS_CUH
#define FD_DSA_WGMMA_ROWS_CUH

#include "wgmma.cuh"

namespace fd_dsa::hopper {

#define FD_DSA_WGMMA_ROWS_16(TYPE)                                                                \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {"                            \
      "%0, %1, %2, %3, %4, %5, %6, %7}, "                                                         \
      "{%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}\n"                                                 \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),                                           \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

#define FD_DSA_WGMMA_ROWS_32(TYPE)                                                                \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {"                            \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "                   \
      "{%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"                                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),                                           \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),                                           \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                                         \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

// d [64 x kColumns] = a [64 x 16] * b [16 x kColumns] (+ d): a in registers, 16 rows a warp as
// `multiply_add` has them, b K-major in shared memory. A thread has of d, of each 8 columns, two of
// row g and two of row g + 8.
template <int kColumns, bool kBfloat16>
__device__ __forceinline__ void wgmma_rows(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                           uint64_t b, bool add) {
  static_assert(kColumns == 16 || kColumns == 32);
#if defined(FD_DSA_HOPPER)
  if constexpr (kColumns == 16) {
    if constexpr (kBfloat16) FD_DSA_WGMMA_ROWS_16("bf16");
    else FD_DSA_WGMMA_ROWS_16("f16");
  } else {
    if constexpr (kBfloat16) FD_DSA_WGMMA_ROWS_32("bf16");
    else FD_DSA_WGMMA_ROWS_32("f16");
  }
#endif
}

#undef FD_DSA_WGMMA_ROWS_16
#undef FD_DSA_WGMMA_ROWS_32

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_WGMMA_ROWS_CUH
