// Tiles of a grouped GEMM of experts, which the blocks of a launch take in turn.
//
// A tile is some of an expert's pairs by a group of columns. Tiles of the same weights are
// neighbours, run at the same time and find in L2 the weights that the first of them has read.
#pragma once

#include "hopper.cuh"

namespace fd_dsa::experts {

constexpr int kMaxExperts = 1024;
// row tiles of an expert whose column tiles are neighbours
[[maybe_unused]] constexpr int kBand = 8;
[[maybe_unused]] constexpr uint32_t kNoTile = 0xffffffffu;

struct Tile {
  int expert, first, left;  // first pair in the expert's list, count of pairs from there on
  int group;                // column group
};

// Returns the most tiles that any choice of experts makes. One tile of an expert may not be full.
inline int64_t max_tiles(int num_experts, int num_pairs, int rows, int groups) {
  const int partial = num_experts < num_pairs ? num_experts : num_pairs;
  return static_cast<int64_t>(partial + num_pairs / rows) * groups;
}

#if defined(FD_DSA_HOPPER)

// Writes the row tiles of experts 0..e to entry e at the shared address `ends`. One warp calls it.
template <int kRows, typename Job>
__device__ __forceinline__ void count_tiles(const Job& job, uint32_t ends, int lane) {
  uint32_t before = 0;
  for (int first = 0; first < job.num_experts; first += kWarp) {
    const int expert = first + lane;
    const int count = expert < job.num_experts ? __ldg(job.counts + expert) : 0;
    const uint32_t end = before + warp_prefix((count + kRows - 1) / kRows);
    if (expert < job.num_experts) hopper::store_shared(ends + expert * 4, end);
    before = __shfl_sync(kAllLanes, end, kWarp - 1);
  }
}

// Finds the tile of a number, and returns false past the last tile.
//
// The tiles of an expert come in bands of row tiles. In a band, tiles of the same columns are
// neighbours.
template <int kRows, typename Job>
__device__ __forceinline__ bool find_tile(const Job& job, uint32_t groups, uint32_t ends,
                                          uint32_t number, Tile& tile) {
  int low = 0, high = job.num_experts;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (hopper::load_shared(ends + middle * 4) <= number / groups) low = middle + 1;
    else high = middle;
  }
  if (low == job.num_experts) return false;
  const uint32_t before = low > 0 ? hopper::load_shared(ends + (low - 1) * 4) : 0;
  const uint32_t tiles = hopper::load_shared(ends + low * 4) - before;
  const uint32_t inside = number - before * groups, band = inside / (kBand * groups) * kBand;
  const uint32_t height = min(tiles - band, static_cast<uint32_t>(kBand));
  const uint32_t in_band = inside - band * groups;
  tile.expert = low;
  tile.first = static_cast<int>(band + in_band % height) * kRows;
  tile.left = __ldg(job.counts + low) - tile.first;
  tile.group = static_cast<int>(in_band / height);
  return true;
}

// Returns the expert's list from the tile's first pair on.
template <typename Job>
__device__ __forceinline__ const int32_t* pairs_of(const Job& job, const Tile& tile) {
  return job.pairs + static_cast<int64_t>(tile.expert) * job.num_tokens + tile.first;
}

__device__ __forceinline__ float silu_times(float gate, float up) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float small = hopper::exp2_of(-fabsf(gate) * kLog2E);
  return gate * __fdividef(gate >= 0 ? 1.0f : small, 1.0f + small) * up;
}

#endif

}  // namespace fd_dsa::experts
