// Stands in for custom_ops/csrc/sparse_mla_values.cuh, whose guard it takes.
#ifndef FD_DSA_SPARSE_MLA_VALUES_CUH
#define FD_DSA_SPARSE_MLA_VALUES_CUH

#include "hopper.cuh"

struct __nv_bfloat16 {
  uint16_t bits;
};

namespace fd_dsa::hopper {

inline int unknown(int x) { return x; }

template <typename T>
void store_shared(uint32_t at, T value) {
  std::memcpy(resolve(at, sizeof(T)), &value, sizeof(T));
}

template <typename T>
T load_shared_as(uint32_t at) {
  T value;
  std::memcpy(&value, resolve(at, sizeof(T)), sizeof(T));
  return value;
}
inline uint32_t load_shared(uint32_t at) { return load_shared_as<uint32_t>(at); }
inline float load_shared_float(uint32_t at) { return load_shared_as<float>(at); }
inline float2 load_shared_float2(uint32_t at) { return load_shared_as<float2>(at); }
inline float4 load_shared_float4(uint32_t at) { return load_shared_as<float4>(at); }
inline uint4 load_shared_uint4(uint32_t at) { return load_shared_as<uint4>(at); }

inline uint32_t half_bits(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}

inline uint32_t bfloat16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float value_of_code(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
  if ((code & 127) == 127) return NAN;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return code & 128 ? -size : size;
}

template <bool kUpper>
uint32_t values_of_codes(uint32_t word) {
  if (kUpper) word >>= 16;
  return half_bits(value_of_code(word & 255)) | half_bits(value_of_code(word >> 8 & 255)) << 16;
}

inline uint32_t times_halves(uint32_t x, uint32_t y) {
  return half_bits(value_of<false>(x) * value_of<false>(y)) |
         half_bits(value_of<false>(x >> 16) * value_of<false>(y >> 16)) << 16;
}

inline uint4 load_16(const char* from, bool read) {
  uint4 x = {};
  if (!read) return x;
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) abort();
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline float exp2_of(float x) { return std::exp2(x); }
inline uint32_t pack_half(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t pack_bfloat16(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}
inline float low_of(uint32_t x) { return __uint_as_float(x << 16); }
inline float high_of(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_SPARSE_MLA_VALUES_CUH
