// Replaces custom_ops/csrc/hopper.cuh, whose guard it takes.
#ifndef FD_DSA_HOPPER_CUH
#define FD_DSA_HOPPER_CUH

#include <array>
#include <map>

#include "common.cuh"

#define FD_DSA_HOPPER 1

struct __nv_bfloat16 {
  uint16_t bits;
};

namespace fd_dsa::hopper {

// ---- shared memory

// Addresses: the rank of a block and one more, and a place in its memory.
constexpr uint32_t kWindow = 1 << 20;

inline emulated::Block& own() { return *emulated::current->block; }

inline unsigned char* shared_memory() { return own().memory.data(); }

inline uint32_t shared_address(const void* at) {
  return (own().rank + 1) * kWindow +
         static_cast<uint32_t>(static_cast<const unsigned char*>(at) - own().memory.data());
}

// Where an address is, for an access of so many bytes.
[[gnu::always_inline]] inline unsigned char* resolve(uint32_t address, size_t bytes, bool remote = false) {
  const uint32_t rank = address / kWindow - 1, offset = address % kWindow;
  emulated::Block& block = rank == own().rank ? own() : *own().cluster->blocks.at(rank);
  // of another block: it must still run
  if ((&block != &own() && !remote) || block.barrier.members == 0) abort();
  if (offset % bytes != 0 && bytes <= 16) abort();
  if (offset + bytes > block.memory.size()) abort();
  return block.memory.data() + offset;
}

template <typename T>
void store_shared(uint32_t at, T value) {
  std::memcpy(resolve(at, sizeof(T)), &value, sizeof(T));
}
inline void store_shared_if(bool stores, uint32_t at, uint4 value) {
  if (stores) store_shared(at, value);
}

template <typename T>
T load_shared_as(uint32_t at) {
  T value;
  std::memcpy(&value, resolve(at, sizeof(T)), sizeof(T));
  return value;
}
inline uint32_t load_shared(uint32_t at) { return load_shared_as<uint32_t>(at); }
inline uint32_t load_shared_byte(uint32_t at) { return load_shared_as<uint8_t>(at); }
inline float load_shared_float(uint32_t at) { return load_shared_as<float>(at); }
inline float2 load_shared_float2(uint32_t at) { return load_shared_as<float2>(at); }
inline float4 load_shared_float4(uint32_t at) { return load_shared_as<float4>(at); }
inline uint2 load_shared_uint2(uint32_t at) { return load_shared_as<uint2>(at); }
inline uint4 load_shared_uint4(uint32_t at) { return load_shared_as<uint4>(at); }

// ---- barriers

struct CopyBarrier {
  int expected = 0, pending = 0, bytes = 0;
  int parity = 0;
  void check() {
    if (pending == 0 && bytes == 0) {
      pending = expected;
      parity ^= 1;
    }
  }
};

inline CopyBarrier& barrier_at(uint32_t address) {
  static std::map<unsigned char*, CopyBarrier> all;
  return all[resolve(address, 8)];
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  const int count = static_cast<int>(arrivals);
  barrier_at(barrier) = {count, count, 0, 0};
}
inline void barriers_ready() {}
inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  CopyBarrier& found = barrier_at(barrier);
  if (found.pending == 0) abort();
  --found.pending;
  found.bytes += static_cast<int>(bytes);
  found.check();
}
inline void barrier_arrive(uint32_t barrier) { barrier_arrive_expecting(barrier, 0); }
#if defined(FD_DSA_EVERY_LANE_ARRIVES)
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
inline void warp_arrive(uint32_t barrier, int lane) {
  __syncwarp();
  if (kWarpArrivals == 32 || lane == 0) barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::wait_while(barrier_at(barrier).parity, static_cast<int>(parity));
}

inline emulated::Barrier& named_barrier_at(int number, int threads) {
  emulated::Barrier& barrier = own().named_barriers[number];
  barrier.members = threads;
  return barrier;
}
inline void named_barrier(int number, int threads) {
  emulated::wait_at(named_barrier_at(number, threads));
}

inline void named_barrier_apart(int number, int threads) { named_barrier(number, threads); }

inline void named_barrier_arrive(int number, int threads) {
  emulated::Barrier& barrier = named_barrier_at(number, threads);
  ++barrier.arrived;
  barrier.check();
}

// ---- copies

// Soon, and sometimes long after what was asked for later.
inline void happens_later(std::function<void()> what) {
  static uint32_t seed = 7;
  seed = seed * 1664525u + 1013904223u;
  const int longer = (seed >> 20 & 63) == 0 ? 100 : 1;
  const uint64_t round = emulated::rounds_run + 1 + (seed >> 29) * longer;
  emulated::later[round].push_back(std::move(what));
}

inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) abort();
  unsigned char* there = resolve(to, bytes);
  CopyBarrier& found = barrier_at(barrier);
  happens_later([=, &found] {
    std::memcpy(there, from, bytes);
    found.bytes -= static_cast<int>(bytes);
    found.check();
  });
}

// What a thread has under way of one kind.
template <int kKind>
int& under_way() {
  static std::map<emulated::Fiber*, int> all;
  return all[emulated::current];
}

inline void store_bulk(void* to, uint32_t from, uint32_t bytes) {
  if (from % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0 || bytes % 16 != 0) abort();
  const unsigned char* there = resolve(from, bytes);
  int& left = under_way<0>();
  ++left;
  happens_later([=, &left] {
    std::memcpy(to, there, bytes);
    --left;
  });
}
inline void prefetch(const void*) {}
inline void wait_for_bulk_stores() {
  emulated::wait_until_zero(under_way<0>());
}

// A thread's copies of 16 bytes that have not landed, and what happens once all have.
struct Copies {
  int left = 0;
  std::vector<std::function<void()>> behind;
};

inline Copies& copies() {
  static std::map<emulated::Fiber*, Copies> all;
  return all[emulated::current];
}

template <int kBytes>
void copy_some(uint32_t to, const void* from, bool read) {
  if (reinterpret_cast<uintptr_t>(from) % kBytes != 0) abort();
  unsigned char* there = resolve(to, kBytes);
  Copies& mine = copies();
  ++mine.left;
  happens_later([=, &mine] {
    if (read) std::memcpy(there, from, kBytes);
    else std::memset(there, 0, kBytes);
    if (--mine.left > 0) return;
    for (const auto& happens : std::exchange(mine.behind, {})) happens();
  });
}
inline void copy_16(uint32_t to, const void* from, bool read) { copy_some<16>(to, from, read); }
template <int kBytes>
void copy_few(uint32_t to, const void* from, bool read) {
  copy_some<kBytes>(to, from, read);
}

inline void barrier_arrive_after_copies(uint32_t barrier) {
  CopyBarrier& found = barrier_at(barrier);
  const auto arrive = [&found] {
    if (found.pending == 0) abort();
    --found.pending;
    found.check();
  };
  Copies& mine = copies();
  if (mine.left == 0) arrive();
  else mine.behind.emplace_back(arrive);
}

inline void wait_for_copies() {
  emulated::wait_until_zero(copies().left);
}

template <typename T>
T load_some(const char* from, bool read) {
  T x = {};
  if (!read) return x;
  if (reinterpret_cast<uintptr_t>(from) % sizeof(x) != 0) abort();
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline uint4 load_16(const char* from, bool read) { return load_some<uint4>(from, read); }
inline uint2 load_8(const char* from, bool read) { return load_some<uint2>(from, read); }

// ---- clusters, registers

inline void cluster_sync() { emulated::wait_at(own().cluster->barrier); }

inline uint32_t address_at_rank(uint32_t address, uint32_t rank) {
  return (rank + 1) * kWindow + address % kWindow;
}

template <typename T>
T load_cluster(uint32_t address) {
  T x;
  std::memcpy(&x, resolve(address, sizeof(x), true), sizeof(x));
  return x;
}
inline float load_cluster_float(uint32_t address) { return load_cluster<float>(address); }
inline float2 load_cluster_float2(uint32_t address) { return load_cluster<float2>(address); }
inline float4 load_cluster_float4(uint32_t address) { return load_cluster<float4>(address); }

template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}

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

#endif  // FD_DSA_HOPPER_CUH
