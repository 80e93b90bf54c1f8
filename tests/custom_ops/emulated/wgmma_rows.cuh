// Stands in for custom_ops/csrc/wgmma.cuh and wgmma_rows.cuh, whose guards it takes.
#ifndef FD_DSA_WGMMA_ROWS_CUH
#define FD_DSA_WGMMA_CUH
#define FD_DSA_WGMMA_ROWS_CUH

#include "hopper.cuh"

namespace fd_dsa::hopper {

inline void publish_to_async() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kGroups>
void wgmma_wait() {}
template <int kCount>
void pin(float (&)[kCount]) {}

inline uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

struct Operand {
  uint32_t address;
  uint64_t at(uint32_t bytes) const { return address + bytes; }
};
inline Operand k_major(uint32_t address) {
  if (address % 1024 != 0) abort();
  return {address};
}

// A warp's rows, at once: what is read too late, or written too early, is not seen here.
template <int kColumns, bool kBfloat16>
void wgmma_rows(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  const auto upper = all_lanes(uint64_t{a[2]} << 32 | a[0]);
  const auto lower = all_lanes(uint64_t{a[3]} << 32 | a[1]);
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  for (unsigned i = 0; i < kColumns / 2; ++i) {
    const unsigned column = i / 4 * 8 + 2 * t + i % 2;
    double sum = add ? d[i] : 0.0;
    for (unsigned k = 0; k < 16; ++k) {
      const uint64_t row = (i % 4 < 2 ? upper : lower)[4 * g + k % 8 / 2];
      // hardware swizzles bits of the address
      uint32_t at = static_cast<uint32_t>(b) + column * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;
      uint16_t right;
      std::memcpy(&right, resolve(at, 2), 2);
      sum += static_cast<double>(value_of<kBfloat16>(row >> (k / 8 * 32 + k % 2 * 16))) *
             value_of<kBfloat16>(right);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_WGMMA_ROWS_CUH
