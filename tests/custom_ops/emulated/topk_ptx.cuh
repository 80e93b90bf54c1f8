// Replaces custom_ops/csrc/topk_ptx.cuh, whose guard it takes.
#ifndef FD_DSA_TOPK_PTX_CUH
#define FD_DSA_TOPK_PTX_CUH

#include "common.cuh"

namespace fd_dsa::topk {

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
    while (all().barrier.turn == emulated::current->arrived_at) emulated::yield();
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

}  // namespace fd_dsa::topk

#endif  // FD_DSA_TOPK_PTX_CUH
