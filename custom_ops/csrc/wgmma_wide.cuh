// Hopper's tensor cores with both operands in shared memory, and copies of 16 bytes to there.
#ifndef FD_DSA_WGMMA_WIDE_CUH
#define FD_DSA_WGMMA_WIDE_CUH

#include "wgmma.cuh"

namespace fd_dsa::hopper {

// ---- copies

// 16 bytes from global to shared memory, zeros instead where `read` is false.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(read ? 16 : 0)
               : "memory");
}

// The barrier gets an arrival of this thread once its copies by copy_16 have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits until this thread's copies by copy_16 have landed.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Arrives at a barrier of `threads` threads without waiting; see `named_barrier`.
__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- operands

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// ---- products

#define FD_DSA_WGMMA_SCORES(TYPE)                                                                 \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                            \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                    \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "         \
      "%32, %33, p, 1, 1, 0, 0;\n}\n"                                                             \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),                                           \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),                                           \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                                         \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),                                       \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),                                       \
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                                       \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),                                       \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                        \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

#define FD_DSA_WGMMA_SUMS(TYPE)                                                                   \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"                           \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                    \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "          \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "          \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "          \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "          \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "          \
      "%96, %97, %98, %99, %100, %101, %102, %103, "                                              \
      "%104, %105, %106, %107, %108, %109, %110, %111, "                                          \
      "%112, %113, %114, %115, %116, %117, %118, %119, "                                          \
      "%120, %121, %122, %123, %124, %125, %126, %127}, "                                         \
      "%128, %129, p, 1, 1, 0, 1;\n}\n"                                                           \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),                                           \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),                                           \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),                                         \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),                                       \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),                                       \
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),                                       \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),                                       \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),                                       \
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),                                       \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),                                       \
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),                                       \
        "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),                                       \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),                                       \
        "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),                                       \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),                                       \
        "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),                                       \
        "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]),                                       \
        "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),                                       \
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]),                                       \
        "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),                                       \
        "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),                                       \
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),                                       \
        "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]),                                       \
        "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),                                       \
        "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]),                                       \
        "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),                                   \
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]),                                   \
        "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),                                   \
        "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),                                   \
        "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),                                   \
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]),                                   \
        "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// d [64 x 64] = a [64 x 16] * b [16 x 64] (+ d), both K-major in shared memory.
template <bool kBfloat16>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, bool add) {
#if defined(FD_DSA_HOPPER)
  if constexpr (kBfloat16) FD_DSA_WGMMA_SCORES("bf16");
  else FD_DSA_WGMMA_SCORES("f16");
#endif
}

// d [64 x 256] += a [64 x 16] * b [16 x 256]: a K-major in shared memory, b row-major.
template <bool kBfloat16>
__device__ __forceinline__ void wgmma_sums(float (&d)[128], uint64_t a, uint64_t b) {
#if defined(FD_DSA_HOPPER)
  constexpr bool add = true;
  if constexpr (kBfloat16) FD_DSA_WGMMA_SUMS("bf16");
  else FD_DSA_WGMMA_SUMS("f16");
#endif
}

#undef FD_DSA_WGMMA_SCORES
#undef FD_DSA_WGMMA_SUMS

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_WGMMA_WIDE_CUH
