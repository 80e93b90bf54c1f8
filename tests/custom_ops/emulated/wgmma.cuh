// Stands in for custom_ops/csrc/wgmma.cuh, whose guard it takes.
#ifndef FD_DSA_WGMMA_CUH
#define FD_DSA_WGMMA_CUH

#include <deque>

#include "hopper.cuh"

namespace fd_dsa::hopper {

// Products of a thread that have not been waited for: each happens when it is asked for or when it
// is waited for, in order, so that what is written too late, or too early, is seen.
struct Products {
  std::deque<std::pair<int, std::function<void()>>> left;
  int group = 0;
  void run_up_to(int last) {
    while (!left.empty() && left.front().first <= last) {
      const auto product = std::move(left.front().second);
      left.pop_front();
      product();
    }
  }
};

inline Products& products() {
  static std::map<emulated::Fiber*, Products> all;
  return all[emulated::current];
}

inline void product(std::function<void()> what) {
  static uint32_t seed = 3;
  seed = seed * 1664525u + 1013904223u;
  Products& mine = products();
  mine.left.emplace_back(mine.group, std::move(what));
  if (seed >> 31) mine.run_up_to(mine.group);
}

inline void publish_to_async() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { ++products().group; }
template <int kGroups>
void wgmma_wait() {
  Products& mine = products();
  mine.run_up_to(mine.group - 1 - kGroups);
}
template <int kCount>
void pin(float (&)[kCount]) {}

inline uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// An address, and where the next 64 columns are.
struct Operand {
  uint32_t address, next_columns;
  uint64_t at(uint32_t bytes) const { return uint64_t{next_columns} << 32 | (address + bytes); }
};
inline Operand k_major(uint32_t address) {
  if (address % 1024 != 0) abort();
  return {address, 0};
}
inline Operand row_major(uint32_t address, uint32_t next_columns) {
  if (address % 1024 != 0 || next_columns % 1024 != 0) abort();
  return {address, next_columns};
}

// The 16-bit value at an address whose bits hardware swizzles.
template <bool kBfloat16>
double value_at(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, resolve(address ^ (address >> 7 & 7) << 4, 2), 2);
  return value_of<kBfloat16>(bits);
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_WGMMA_CUH
