// Stands in for custom_ops/csrc/wgmma_rows.cuh, whose guard it takes.
#ifndef FD_DSA_WGMMA_ROWS_CUH
#define FD_DSA_WGMMA_ROWS_CUH

#include "wgmma.cuh"

namespace fd_dsa::hopper {

// A warp's rows. Those in registers are read at once: nothing overwrites them before a wait.
template <int kColumns, bool kBfloat16>
void wgmma_rows(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  const auto upper = all_lanes(uint64_t{a[2]} << 32 | a[0]);
  const auto lower = all_lanes(uint64_t{a[3]} << 32 | a[1]);
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  product([=, &d] {
    for (unsigned i = 0; i < kColumns / 2; ++i) {
      const unsigned column = i / 4 * 8 + 2 * t + i % 2;
      double sum = add ? d[i] : 0.0;
      for (unsigned k = 0; k < 16; ++k) {
        const uint64_t row = (i % 4 < 2 ? upper : lower)[4 * g + k % 8 / 2];
        sum += static_cast<double>(value_of<kBfloat16>(row >> (k / 8 * 32 + k % 2 * 16))) *
               value_at<kBfloat16>(static_cast<uint32_t>(b) + column * 128 + k * 2);
      }
      d[i] = static_cast<float>(sum);
    }
  });
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_WGMMA_ROWS_CUH
