// Hopper's products of a warpgroup: operands in shared memory, and the order of products.
#ifndef FD_DSA_WGMMA_CUH
#define FD_DSA_WGMMA_CUH

#include "hopper.cuh"

namespace fd_dsa::hopper {

// ---- operands

// Place of 16-byte chunk `chunk` (0 to 7) of a row in an operand, swizzled by 128 bytes.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// An operand: rows of 128 bytes, 8 rows after 8 rows from a multiple of 1024 on. To step on costs
// one addition, so that products of 32 cycles follow each other closely. An address has the rank
// of its block in the cluster above its lowest 18 bits.
struct Operand {
  uint32_t low;

  // `bytes` on, a multiple of 16.
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
    constexpr uint64_t kSwizzle128 = 1ull << 62, kNextRows = 1024 / 16;
    return kSwizzle128 | kNextRows << 32 | (low + bytes / 16);
  }
};

// Rows are those of the product, columns are summed over; 16 of these are 32 bytes.
__device__ __forceinline__ Operand k_major(uint32_t address) {
  return {(address & 0x3ffff) >> 4 | 1u << 16};
}

// Rows are what is summed over, columns those of the product: 64 of them lie side by side, the next
// ones `next_columns` bytes on. 16 rows are 2048 bytes.
__device__ __forceinline__ Operand row_major(uint32_t address, uint32_t next_columns) {
  return {(address & 0x3ffff) >> 4 | next_columns >> 4 << 16};
}

// What this thread wrote to shared memory, or waited for, is seen by wgmma.
__device__ __forceinline__ void publish_to_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- products

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most so many of the last groups run.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps a value in its registers here, so that no use of it moves across.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_WGMMA_CUH
