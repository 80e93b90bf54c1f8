// Stands in for custom_ops/csrc/wgmma_wide.cuh, whose guard it takes.
#ifndef FD_DSA_WGMMA_WIDE_CUH
#define FD_DSA_WGMMA_WIDE_CUH

#include "wgmma.cuh"

namespace fd_dsa::hopper {

// A thread's copies of 16 bytes that have not landed, and what happens once all have.
struct Copies {
  int left = 0;
  std::vector<std::function<void()>> behind;
};

inline Copies& copies() {
  static std::map<emulated::Fiber*, Copies> all;
  return all[emulated::current];
}

inline void copy_16(uint32_t to, const void* from, bool read) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) abort();
  unsigned char* there = resolve(to, 16);
  Copies& mine = copies();
  ++mine.left;
  happens_later([=, &mine] {
    if (read) std::memcpy(there, from, 16);
    else std::memset(there, 0, 16);
    if (--mine.left > 0) return;
    for (const auto& happens : std::exchange(mine.behind, {})) happens();
  });
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
  const Copies& mine = copies();
  while (mine.left > 0) emulated::yield();
}

inline void named_barrier_arrive(int number, int threads) {
  emulated::Barrier& barrier = named_barrier_at(number, threads);
  ++barrier.arrived;
  barrier.check();
}

inline void store_matrices(uint32_t row, const uint32_t (&from)[4]) {
  const auto rows = all_lanes(row);
  const unsigned lane = emulated::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const auto address = static_cast<uint32_t>(rows[8 * i + lane / 4]);
    std::memcpy(resolve(address, 16) + lane % 4 * 4, &from[i], 4);
  }
}

// What a thread has of the products of its warpgroup: rows g and g + 8 of its warp's 16, and of each
// 8 columns two. `column_at(k, column)` says where b has a value.
template <bool kBfloat16, int kCount, typename Column>
void wgmma_shared(float (&d)[kCount], uint64_t a, bool add, Column column_at) {
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  const unsigned first = emulated::current->thread / 32 % 4 * 16 + g;
  product([=, &d] {
    double rows[2][16];
    for (unsigned i = 0; i < 32; ++i) {
      const uint32_t row = static_cast<uint32_t>(a) + (first + i / 16 * 8) * 128;
      rows[i / 16][i % 16] = value_at<kBfloat16>(row + i % 16 * 2);
    }
    for (unsigned i = 0; i < kCount; i += 4) {
      for (unsigned k = 0; k < 2; ++k) {
        double upper = add ? d[i + k] : 0.0, lower = add ? d[i + 2 + k] : 0.0;
        for (unsigned j = 0; j < 16; ++j) {
          const double x = value_at<kBfloat16>(column_at(j, i / 4 * 8 + 2 * t + k));
          upper += rows[0][j] * x;
          lower += rows[1][j] * x;
        }
        d[i + k] = static_cast<float>(upper);
        d[i + 2 + k] = static_cast<float>(lower);
      }
    }
  });
}

template <bool kBfloat16>
void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  wgmma_shared<kBfloat16>(d, a, add, [=](unsigned k, unsigned column) {
    return static_cast<uint32_t>(b) + column * 128 + k * 2;
  });
}

template <bool kBfloat16>
void wgmma_sums(float (&d)[128], uint64_t a, uint64_t b) {
  wgmma_shared<kBfloat16>(d, a, true, [=](unsigned k, unsigned column) {
    const auto next = static_cast<uint32_t>(b >> 32);
    return static_cast<uint32_t>(b) + column / 64 * next + k * 128 + column % 64 * 2;
  });
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_WGMMA_WIDE_CUH
