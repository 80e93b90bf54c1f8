// Conversions and the tensor cores of a warp, of the other form of hopper.cuh, which includes this.
#pragma once

#include <array>

namespace fd_dsa::hopper {

// ---- conversions

inline int unknown(int x) { return x; }

// the compiler's own conversion is a call
inline const std::vector<float> values_of_all_halves = [] {
  std::vector<float> all(1 << 16);
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    _Float16 value;
    std::memcpy(&value, &half, sizeof(value));
    all[bits] = static_cast<float>(value);
  }
  return all;
}();

template <bool kBfloat16>
[[gnu::always_inline]] inline float value_of(uint64_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  if (kBfloat16) return __uint_as_float(static_cast<uint32_t>(half) << 16);
  return values_of_all_halves[half];
}

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

inline float computed_value_of_code(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
  if ((code & 127) == 127) return NAN;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return code & 128 ? -size : size;
}

inline const std::array<float, 256> values_of_all_codes = [] {
  std::array<float, 256> all;
  for (uint32_t code = 0; code < 256; ++code) all[code] = computed_value_of_code(code);
  return all;
}();
inline float value_of_code(uint32_t code) { return values_of_all_codes[code]; }

template <bool kUpper>
uint32_t values_of_codes(uint32_t word) {
  if (kUpper) word >>= 16;
  return half_bits(value_of_code(word & 255)) | half_bits(value_of_code(word >> 8 & 255)) << 16;
}

inline uint32_t times_halves(uint32_t x, uint32_t y) {
  return half_bits(value_of<false>(x) * value_of<false>(y)) |
         half_bits(value_of<false>(x >> 16) * value_of<false>(y >> 16)) << 16;
}

template <bool kUpper>
uint32_t times_bfloat16(uint32_t x, uint32_t word) {
  const float factor = value_of<true>(kUpper ? word >> 16 : word);
  return bfloat16_bits(value_of<true>(x) * factor) |
         bfloat16_bits(value_of<true>(x >> 16) * factor) << 16;
}
inline uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline uint32_t minus_bfloat16(uint32_t x, uint32_t y) {
  return bfloat16_bits(value_of<true>(x) - value_of<true>(y)) |
         bfloat16_bits(value_of<true>(x >> 16) - value_of<true>(y >> 16)) << 16;
}

template <bool kUpper>
uint32_t bfloat16_of_codes(uint32_t word, uint32_t scale) {
  if (kUpper) word >>= 16;
  const float factor = value_of<true>(scale);
  return bfloat16_bits(value_of_code(word & 255) * factor) |
         bfloat16_bits(value_of_code(word >> 8 & 255) * factor) << 16;
}

inline float exp2_of(float x) { return std::exp2(x); }
inline uint32_t pack_half(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t pack_bfloat16(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}

// The nearest of all codes, the even one of two.
inline uint32_t code_of(float value) {
  if (value != value) return 0x7f;
  const float size = std::fabs(value);
  uint32_t low = 0, high = 0x7e;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (value_of_code(middle) <= size ? low : high) = middle;
  }
  const float down = size - value_of_code(low), up = value_of_code(high) - size;
  return (down < up || (down == up && low % 2 == 0) ? low : high) | (std::signbit(value) ? 128 : 0);
}
inline uint16_t pack_codes(float low, float high) {
  return static_cast<uint16_t>(code_of(low) | code_of(high) << 8);
}

inline float low_of(uint32_t x) { return __uint_as_float(x << 16); }
inline float high_of(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

// ---- tensor cores of a warp

// What all lanes give, by value: the warp's own memory is written again at the next exchange.
inline std::array<uint64_t, emulated::kLanes> all_lanes(uint64_t value) {
  std::array<uint64_t, emulated::kLanes> found;
  std::copy_n(emulated::gather(value), emulated::kLanes, found.begin());
  return found;
}

inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  const auto rows = all_lanes(row);
  const unsigned lane = emulated::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const auto address = static_cast<uint32_t>(rows[8 * i + lane / 4]);
    std::memcpy(&to[i], resolve(address, 16) + lane % 4 * 4, 4);
  }
}

inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  const auto rows = all_lanes(row);
  const unsigned lane = emulated::lane();
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (unsigned k = 0; k < 2; ++k) {
      const auto address = static_cast<uint32_t>(rows[8 * i + lane % 4 * 2 + k]);
      std::memcpy(&pair[k], resolve(address, 16) + lane / 4 * 2, 2);
    }
    to[i] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
  }
}

inline void store_matrices(uint32_t row, const uint32_t (&from)[4]) {
  const auto rows = all_lanes(row);
  const unsigned lane = emulated::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const auto address = static_cast<uint32_t>(rows[8 * i + lane / 4]);
    std::memcpy(resolve(address, 16) + lane % 4 * 4, &from[i], 4);
  }
}

inline void store_matrices_transposed(uint32_t row, const uint32_t (&from)[4]) {
  const auto rows = all_lanes(row);
  const unsigned lane = emulated::lane();
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < 2; ++k) {
      const auto address = static_cast<uint32_t>(rows[8 * i + lane % 4 * 2 + k]);
      const auto half = static_cast<uint16_t>(from[i] >> 16 * k);
      std::memcpy(resolve(address, 16) + lane / 4 * 2, &half, 2);
    }
  }
}

template <bool kBfloat16>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint64_t upper, lower, right;
  };
  // a lane may give the next ones while others read these, but not those after
  static std::map<emulated::Warp*, std::array<std::array<Operands, emulated::kLanes>, 2>> exchange;
  emulated::Warp& warp = own().warps[emulated::current->thread / emulated::kLanes];
  auto& all = exchange[&warp][warp.barrier.turn % 2];
  const auto pair = [](uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; };
  all[emulated::lane()] = {pair(a[0], a[2]), pair(a[1], a[3]), pair(b[0], b[1])};
  emulated::gather(0);
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    double sum = d[i];
    // 16 values of a row are in 4 lanes, 2 and 2
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned from = k % 8 / 2, shift = k / 8 * 32 + k % 2 * 16;
      const Operands& left = all[4 * g + from];
      sum += static_cast<double>(value_of<kBfloat16>((i < 2 ? left.upper : left.lower) >> shift)) *
             value_of<kBfloat16>(all[4 * (2 * t + i % 2) + from].right >> shift);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace fd_dsa::hopper
