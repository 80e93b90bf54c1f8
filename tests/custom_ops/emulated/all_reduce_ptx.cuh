// Replaces custom_ops/csrc/all_reduce_ptx.cuh, whose guard it takes.
#ifndef FD_DSA_ALL_REDUCE_PTX_CUH
#define FD_DSA_ALL_REDUCE_PTX_CUH

#include <chrono>

#include "common.cuh"

namespace fd_dsa::peers {

inline uint4 load_shared_rank(const uint4* at) {
  const auto* words = reinterpret_cast<const volatile uint32_t*>(at);
  return {words[0], words[1], words[2], words[3]};
}

inline void store_shared_rank(uint4* at, uint4 x) {
  auto* words = reinterpret_cast<volatile uint32_t*>(at);
  // as torn as the hardware may do it
  words[2] = x.z;
  words[0] = x.x;
  words[3] = x.w;
  words[1] = x.y;
}

inline uint64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::nanoseconds(now).count());
}

inline void poll_again() { emulated::yield(); }

// Ends the thread alone, and no launch after it is refused.
inline void fail(uint32_t* at, uint32_t value) {
  *at = value;
  emulated::current->done = true;
  emulated::yield();
}

inline void wait_for_inputs() {}
inline void start_next() {}

inline uint32_t bfloat16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_bfloat16(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}

// As fd_dsa.ops._triton_fp8.to_e4m3 does it for the interpreter.
inline uint32_t e4m3_bits(float value) {
  const uint32_t sign = __float_as_uint(value) >> 24 & 0x80;
  if (std::isnan(value)) return 0x7f;
  const uint32_t bits = std::min(__float_as_uint(value) & 0x7fffffffu, 0x43e00000u);
  if (bits >= 0x3c800000) return (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 960) | sign;
  return (__float_as_uint(__uint_as_float(bits) + 16384.0f) - 0x46800000) | sign;
}

inline uint32_t pack_e4m3(float low, float high) { return e4m3_bits(low) | e4m3_bits(high) << 8; }

}  // namespace fd_dsa::peers

#endif  // FD_DSA_ALL_REDUCE_PTX_CUH
