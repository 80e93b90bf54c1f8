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
  int32_t cluster;     // blocks of a row
  int32_t capacity;    // candidates that fit
  int32_t num_bits;    // positions that are put in order at once; a multiple of 128
  int32_t num_chosen;  // k, or 0 where k candidates never fit

  // Bytes of shared memory behind a block's own.
  int32_t list_bytes() const {
    const int32_t order = num_bits / 8 + num_bits / 16 + (num_chosen + 3) / 4 * 16;
    return (cluster > 1 ? 12 : 8) * capacity + order;
  }
};

// What is known of a GPU.
struct Gpu {
  int device;
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

// For rows of which a choice is made; `fixed_bytes` of shared memory are a block's anyway.
inline Sizes choose_sizes(const Rows& rows, const Gpu& gpu, int32_t fixed_bytes) {
  constexpr int32_t kShare = 4096, kMostBits = 1 << 19;
  Sizes sizes = {1, kMinCapacity, 0, 0};
  const int32_t width = rows.width;
  while (gpu.has_clusters && sizes.cluster < kMaxCluster) {
    const int32_t more = 2 * sizes.cluster;
    // more of larger clusters do not find room at once: measured on an H200, at 8 to 32 rows
    const int64_t most = more > 2 ? gpu.num_sms / 2 : gpu.num_sms;
    if (static_cast<int64_t>(rows.num_rows) * more > most || width / more < kShare) break;
    sizes.cluster = more;
  }
  sizes.capacity = 0;
  sizes.num_bits = rounded_up(std::min(width, kMostBits), 1024);
  const int32_t room = gpu.shared_bytes - fixed_bytes - sizes.list_bytes() - 16;
  const float wanted = samples_above(kMaxSamples, width, rows.k);
  const float kept = wanted / std::min(width, kMaxSamples) * width;
  sizes.capacity = std::max(rounded_up(std::min(1.6f * kept, 1e8f), 256), kMinCapacity);
  const int32_t bytes = sizes.cluster > 1 ? 12 : 8;
  if (static_cast<int64_t>(bytes) * sizes.capacity + 4LL * rows.k > room) {
    const int32_t chosen = 4 * std::min(rows.k, room / 4);
    sizes.capacity = std::max((room - chosen) / bytes / 256 * 256, kMinCapacity);
  }
  if (rows.k <= sizes.capacity) sizes.num_chosen = rows.k;
  return sizes;
}

}  // namespace fd_dsa::topk
