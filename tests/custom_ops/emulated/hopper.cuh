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
}  // namespace fd_dsa::hopper

#include "hopper_values.cuh"

#endif  // FD_DSA_HOPPER_CUH
