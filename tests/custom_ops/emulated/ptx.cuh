// Replaces custom_ops/csrc/ptx.cuh, whose guard it takes.
#ifndef FD_DSA_PTX_CUH
#define FD_DSA_PTX_CUH

#include <chrono>
#include <thread>

#include "common.cuh"

namespace fd_dsa {

inline unsigned char* shared_memory() {
  const auto start = reinterpret_cast<uintptr_t>(emulated::current->block->memory.data());
  return reinterpret_cast<unsigned char*>((start + 15) / 16 * 16);
}

template <int kBit>
void mark_above(float a, float b, uint32_t& mask) {
  if (a > b) mask |= 1u << kBit;
}

template <bool kOn>
struct Cluster {
  static emulated::Cluster& all() { return *emulated::current->block->cluster; }
  static uint32_t rank() { return emulated::current->block->rank; }
  static uint32_t size() { return static_cast<uint32_t>(all().blocks.size()); }
  static void arrive() {
    emulated::Barrier& barrier = all().barrier;
    emulated::current->arrived_at = barrier.turn;
    ++barrier.arrived;
    barrier.check();
  }
  static void wait() {
    emulated::wait_while(all().barrier.turn, emulated::current->arrived_at);
  }
  static void sync() {
    arrive();
    wait();
  }
  // The same place in the memory of another block, which must still run.
  template <typename T>
  static T* there(const T* at, uint32_t rank) {
    emulated::Block& block = *all().blocks.at(rank);
    const auto* byte = reinterpret_cast<const unsigned char*>(at);
    const auto offset = byte - emulated::current->block->memory.data();
    if (block.barrier.members == 0) abort();
    if (offset < 0 || offset + sizeof(T) > block.memory.size()) abort();
    return reinterpret_cast<T*>(block.memory.data() + offset);
  }
  template <typename T>
  static void store(T* at, uint32_t rank, T value) {
    *there(at, rank) = value;
  }
  static uint32_t load(const uint32_t* at, uint32_t rank) { return *there(at, rank); }
  static uint32_t add(uint32_t* at, uint32_t rank, uint32_t value) {
    return atomicAdd(there(at, rank), value);
  }
  static void max(uint32_t* at, uint32_t rank, uint32_t value) {
    atomicMax(there(at, rank), value);
  }
};

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

inline void poll_again() {
  // what it waits for comes from another thread of the host, perhaps on the same core
  if (emulated::lane() == 0) std::this_thread::yield();
  emulated::yield();
}

// Ends the thread alone, and no launch after it is refused.
inline void fail(uint32_t* at, uint32_t value) {
  *at = value;
  emulated::current->done = true;
  emulated::yield();
}

inline uint32_t bfloat16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_bfloat16(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}

}  // namespace fd_dsa

#endif  // FD_DSA_PTX_CUH
