// Replaces custom_ops/csrc/wgmma.cuh, whose guard it takes.
#ifndef FD_DSA_WGMMA_CUH
#define FD_DSA_WGMMA_CUH

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <map>

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
template <int kSteps>
void pin(uint32_t (&)[kSteps][4]) {}

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
[[gnu::always_inline]] inline double value_at(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, resolve(address ^ (address >> 7 & 7) << 4, 2), 2);
  return value_of<kBfloat16>(bits);
}

// Hardware reads registers late, so results are NaN if they change before the wait.
inline bool is_changed(const uint32_t (&a)[4], const std::array<uint32_t, 4>& given) {
  return !std::equal(given.begin(), given.end(), a);
}

// A warp's rows.
template <int kColumns, bool kBfloat16>
void wgmma_rows(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  const auto upper = all_lanes(uint64_t{a[2]} << 32 | a[0]);
  const auto lower = all_lanes(uint64_t{a[3]} << 32 | a[1]);
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  const std::array<uint32_t, 4> given = {a[0], a[1], a[2], a[3]};
  product([=, &d, &a] {
    const bool changed = is_changed(a, given);
    for (unsigned i = 0; i < kColumns / 2; ++i) {
      const unsigned column = i / 4 * 8 + 2 * t + i % 2;
      double sum = changed ? NAN : add ? d[i] : 0.0;
      for (unsigned k = 0; k < 16; ++k) {
        const uint64_t row = (i % 4 < 2 ? upper : lower)[4 * g + k % 8 / 2];
        sum += static_cast<double>(value_of<kBfloat16>(row >> (k / 8 * 32 + k % 2 * 16))) *
               value_at<kBfloat16>(static_cast<uint32_t>(b) + column * 128 + k * 2);
      }
      d[i] = static_cast<float>(sum);
    }
  });
}

// What a thread has of the GEMMs of its warpgroup: rows g and g + 8 of its warp's 16, and of each
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

[[gnu::always_inline]] inline float value_of_code_at(uint32_t address) {
  return value_of_code(*resolve(address ^ (address >> 7 & 7) << 4, 1));
}

inline void wgmma_codes(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  const unsigned first = emulated::current->thread / 32 % 4 * 16 + g;
  product([=, &d] {
    float rows[2][32];
    for (unsigned i = 0; i < 64; ++i) {
      rows[i / 32][i % 32] =
          value_of_code_at(static_cast<uint32_t>(a) + (first + i / 32 * 8) * 128 + i % 32);
    }
    for (unsigned i = 0; i < 64; ++i) {
      const uint32_t column = static_cast<uint32_t>(b) + (i / 4 * 8 + 2 * t + i % 2) * 128;
      double sum = add ? d[i] : 0.0;
      for (unsigned k = 0; k < 32; ++k) {
        sum += static_cast<double>(rows[i >> 1 & 1][k]) * value_of_code_at(column + k);
      }
      d[i] = static_cast<float>(sum);
    }
  });
}

template <int kColumns>
void wgmma_code_rows(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  std::array<std::array<uint64_t, emulated::kLanes>, 4> words;
  for (unsigned i = 0; i < 4; ++i) words[i] = all_lanes(a[i]);
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  const std::array<uint32_t, 4> given = {a[0], a[1], a[2], a[3]};
  product([=, &d, &a] {
    const bool changed = is_changed(a, given);
    for (unsigned i = 0; i < kColumns / 2; ++i) {
      const uint32_t column = static_cast<uint32_t>(b) + (i / 4 * 8 + 2 * t + i % 2) * 128;
      double sum = changed ? NAN : add ? d[i] : 0.0;
      for (unsigned k = 0; k < 32; ++k) {
        const uint64_t word = words[(i >> 1 & 1) + k / 16 * 2][4 * g + k % 16 / 4];
        const auto code = static_cast<uint32_t>(word >> k % 4 * 8) & 255;
        // e5m2 is the upper half of a float16
        sum += static_cast<double>(value_of<false>(code << 8)) * value_of_code_at(column + k);
      }
      d[i] = static_cast<float>(sum);
    }
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

#endif  // FD_DSA_WGMMA_CUH
