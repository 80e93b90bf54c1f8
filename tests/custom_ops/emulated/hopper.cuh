// Stands in for custom_ops/csrc/hopper.cuh, whose guard it takes.
#ifndef FD_DSA_HOPPER_CUH
#define FD_DSA_HOPPER_CUH

#include <array>
#include <map>

#include "common.cuh"

#define FD_DSA_HOPPER 1

namespace fd_dsa::hopper {

// Addresses: the rank of a block and one more, and a place in its memory.
constexpr uint32_t kWindow = 1 << 20;

inline emulated::Block& own() { return *emulated::current->block; }

inline unsigned char* shared_memory() { return own().memory.data(); }

inline uint32_t shared_address(const void* at) {
  return (own().rank + 1) * kWindow +
         static_cast<uint32_t>(static_cast<const unsigned char*>(at) - own().memory.data());
}

// Where an address is, for an access of so many bytes.
inline unsigned char* resolve(uint32_t address, size_t bytes, bool remote = false) {
  emulated::Block& block = *own().cluster->blocks.at(address / kWindow - 1);
  const uint32_t offset = address % kWindow;
  // of another block: it must still run
  if ((&block != &own() && !remote) || block.barrier.members == 0) abort();
  if (offset % bytes != 0 && bytes <= 16) abort();
  if (offset + bytes > block.memory.size()) abort();
  return block.memory.data() + offset;
}

struct CopyBarrier {
  int expected = 0, pending = 0, bytes = 0;
  uint32_t parity = 0;
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
  while (barrier_at(barrier).parity == parity) emulated::yield();
}

inline emulated::Barrier& named_barrier_at(int number, int threads) {
  static std::map<std::pair<emulated::Block*, int>, emulated::Barrier> all;
  emulated::Barrier& barrier = all[{&own(), number}];
  barrier.members = threads;
  return barrier;
}
inline void named_barrier(int number, int threads) {
  emulated::wait_at(named_barrier_at(number, threads));
}

inline void named_barrier_apart(int number, int threads) { named_barrier(number, threads); }

// Soon, and sometimes long after what was asked for later.
inline void happens_later(std::function<void()> what) {
  static uint32_t seed = 7;
  seed = seed * 1664525u + 1013904223u;
  const int longer = (seed >> 20 & 63) == 0 ? 100 : 1;
  emulated::later.push_back({1 + static_cast<int>(seed >> 29) * longer, std::move(what)});
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
inline void wait_for_bulk_stores() {
  const int& left = under_way<0>();
  while (left > 0) emulated::yield();
}

inline void cluster_sync() { emulated::wait_at(own().cluster->barrier); }

inline uint32_t address_at_rank(uint32_t address, uint32_t rank) {
  return (rank + 1) * kWindow + address % kWindow;
}

inline float load_cluster_float(uint32_t address) {
  float x;
  std::memcpy(&x, resolve(address, sizeof(x), true), sizeof(x));
  return x;
}
inline float4 load_cluster_float4(uint32_t address) {
  float4 x;
  std::memcpy(&x, resolve(address, sizeof(x), true), sizeof(x));
  return x;
}
inline float2 load_cluster_float2(uint32_t address) {
  float2 x;
  std::memcpy(&x, resolve(address, sizeof(x), true), sizeof(x));
  return x;
}

template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}

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

template <bool kBfloat16>
float value_of(uint64_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  if (kBfloat16) return __uint_as_float(static_cast<uint32_t>(half) << 16);
  _Float16 value;
  std::memcpy(&value, &half, sizeof(value));
  return static_cast<float>(value);
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
    // 16 values of a row lie in 4 lanes, 2 and 2
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
