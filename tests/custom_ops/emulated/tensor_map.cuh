// Replaces custom_ops/csrc/tensor_map.cuh, whose guard it takes.
#ifndef FD_DSA_TENSOR_MAP_CUH
#define FD_DSA_TENSOR_MAP_CUH

#include "hopper.cuh"

namespace fd_dsa::hopper {

struct TensorMap {
  const unsigned char* at;
  uint64_t width, rows;
};

inline cudaError_t make_tile_map(TensorMap& map, const void* at, uint64_t width, uint64_t rows) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0 || width % 16 != 0) return cudaErrorInvalidValue;
  map = {static_cast<const unsigned char*>(at), width, rows};
  return cudaSuccess;
}

// The swizzle is that of addresses, as hardware has it.
inline void copy_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  if (to % 1024 != 0 || column < 0 || row < 0) abort();
  unsigned char* there = resolve(to, 128 * 128);
  CopyBarrier& found = barrier_at(barrier);
  happens_later([=, &found] {
    for (uint64_t i = 0; i < 128 * 128; ++i) {
      const uint64_t x = column + i % 128, y = row + i / 128;
      const bool is_there = x < map.width && y < map.rows;
      there[i ^ (i >> 7 & 7) << 4] = is_there ? map.at[y * map.width + x] : 0;
    }
    found.bytes -= 128 * 128;
    found.check();
  });
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_TENSOR_MAP_CUH
