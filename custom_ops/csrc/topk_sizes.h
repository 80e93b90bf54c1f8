// Top-k: how many blocks and how much shared memory a row gets. These change the time, never the
// result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "topk.h"

namespace fd_dsa::topk {

constexpr int kMaxCluster = 16;
constexpr int kMaxSamples = 4096;
// least number of candidates that fit: their memory has other uses too
constexpr int32_t kMinCapacity = 1024;

struct Sizes {
  int32_t cluster;   // blocks of a row
  int32_t capacity;  // candidates that fit
  int32_t direct;    // rows up to this length are candidates as they are
  int32_t num_bits;  // positions that are put in order at once; a multiple of 32
};

// What is known of a GPU.
struct Gpu {
  int num_sms;
  int shared_bytes;  // most that a block can have
  bool has_clusters;
};

// How many of `size` samples a bound shall exceed, so that k of `length` scores do: 6 standard
// deviations more than are expected. A bound that fails costs time, never exactness.
FD_DSA_BOTH float samples_above(float size, float length, float k) {
  const float share = k / length, seen = size < length ? size / length : 1.0f;
  const float variance = size * share * (1.0f - share) * (1.0f - seen);
  return size * share + 6.0f * sqrtf(variance > 0.0f ? variance : 0.0f) + 4.0f;
}

inline int32_t rounded_up(int64_t value, int32_t step) {
  return static_cast<int32_t>((value + step - 1) / step * step);
}

// `fixed_bytes` of shared memory are a block's whatever the sizes.
inline Sizes choose_sizes(const Rows& rows, const Gpu& gpu, int32_t fixed_bytes) {
  constexpr int32_t kDirect = 4096, kShare = 4096, kMostBits = 1 << 19;
  Sizes sizes = {1, kMinCapacity, 0, 0};
  const int32_t width = rows.lengths != nullptr || rows.width > rows.k ? rows.width : 0;
  sizes.num_bits = rounded_up(std::max(std::min(width, kMostBits), 1024), 1024);
  int32_t room = (gpu.shared_bytes - fixed_bytes - sizes.num_bits / 8) / 8;
  if (width > kDirect) {
    const float wanted = samples_above(kMaxSamples, width, std::min(rows.k, width));
    const float kept = wanted / std::min(width, kMaxSamples) * width;
    const int64_t fit = static_cast<int64_t>(std::min(1.6f * kept, 1e9f));
    sizes.capacity = rounded_up(std::max<int64_t>(fit, kDirect), 256);
    while (gpu.has_clusters && sizes.cluster < kMaxCluster &&
           static_cast<int64_t>(rows.num_rows) * sizes.cluster * 2 <= gpu.num_sms &&
           width / (sizes.cluster * 2) >= kShare) {
      sizes.cluster *= 2;
    }
  } else {
    sizes.capacity = rounded_up(std::max(width, kMinCapacity), 256);
  }
  sizes.capacity = std::min(sizes.capacity, room / 256 * 256);
  sizes.direct = std::min(kDirect, std::min(sizes.capacity, sizes.num_bits));
  return sizes;
}

}  // namespace fd_dsa::topk
