// Tiles of a grouped GEMM of experts, which the blocks of a launch take in turn.
//
// A tile is some of an expert's pairs by a group of columns. Tiles of the same weights are
// neighbours, run at the same time and find in L2 the weights that the first of them has read.
#pragma once

#include <algorithm>

#include "hopper.cuh"

namespace fd_dsa::experts {

constexpr int kMaxExperts = 1024;
// row tiles of an expert whose column tiles are neighbours
[[maybe_unused]] constexpr int kBand = 8;
[[maybe_unused]] constexpr uint32_t kNoTile = 0xffffffffu;

// Numbers of named barriers. Those from kFirstOwnBarrier on are a kernel's own.
enum { kCopierBarrier = 1, kFirstOwnBarrier };

struct Tile {
  int expert, first, left;  // first pair in the expert's list, count of pairs from there on
  int group;                // column group
};

// Prepares a launch whose blocks take tiles of some rows, and sets their number.
//
// Args:
//   together: blocks that share a multiprocessor
//   taken: counter of tiles, see `copy_tiles`, or null
template <typename Kernel, typename Job>
cudaError_t prepare_tiles(Kernel* kernel, const Job& job, int rows, int groups, int bytes,
                          int together, uint32_t* taken, void* stream, std::atomic<uint64_t>& done,
                          uint32_t& blocks) {
  Gpu gpu = {};
  cudaError_t error = prepare_on_hopper(kernel, bytes, false, done, gpu);
  if (error == cudaSuccess && taken != nullptr) {
    error = cudaMemsetAsync(taken, 0, 4, static_cast<cudaStream_t>(stream));
  }
  // an expert has at most one row tile that it does not fill
  const int64_t tiles =
      static_cast<int64_t>(std::min(job.num_experts, job.num_pairs) + job.num_pairs / rows) *
      groups;
  blocks = static_cast<uint32_t>(std::min<int64_t>(gpu.num_sms * together, tiles));
  return error;
}

#if defined(FD_DSA_HOPPER)

// A stage is full after the copies of 128 threads and of the copy engine, and free after the reads
// of 8 warps.
constexpr int kFullArrivals = 128 + 1, kFreeArrivals = 8 * hopper::kWarpArrivals;

// The next of several stages, and the parity of the phase in which it is full.
//
// Two barriers of each stage are in shared memory from `base` + kBarriers on.
template <int kStages, uint32_t kBarriers>
struct StageTurn {
  uint32_t base;
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ uint32_t is_full() const { return base + kBarriers + stage * 8; }
  __device__ __forceinline__ uint32_t is_free() const { return is_full() + kStages * 8; }
};

// Initialises the barriers of all stages. One thread calls it with a new turn.
template <typename Turn>
__device__ __forceinline__ void prepare_stages(Turn turn) {
  for (; turn.parity == 0; turn.advance()) {
    hopper::barrier_init(turn.is_full(), kFullArrivals);
    hopper::barrier_init(turn.is_free(), kFreeArrivals);
  }
  hopper::barriers_ready();
}

// Writes the row tiles of experts 0..e to entry e at the shared address `ends`. One warp calls it.
template <int kRows, typename Job>
__device__ __forceinline__ void count_tiles(const Job& job, uint32_t ends, int lane) {
  constexpr int kAtOnce = 8;  // loads in flight
  uint32_t before = 0;
  for (int first = 0; first < job.num_experts; first += kAtOnce * kWarp) {
    int counts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int expert = first + i * kWarp + lane;
      counts[i] = expert < job.num_experts ? __ldg(job.counts + expert) : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int expert = first + i * kWarp + lane;
      const uint32_t end = before + warp_prefix((counts[i] + kRows - 1) / kRows);
      if (expert < job.num_experts) hopper::store_shared(ends + expert * 4, end);
      before = __shfl_sync(kAllLanes, end, kWarp - 1);
    }
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

// Finds the tile of a number like `find_tile`, and divides an expert's pairs evenly among its tiles.
template <int kRows, typename Job>
__device__ __forceinline__ bool find_even_tile(const Job& job, uint32_t groups, uint32_t ends,
                                               uint32_t number, Tile& tile) {
  if (!find_tile<kRows>(job, groups, ends, number, tile)) return false;
  const int count = tile.first + tile.left, tiles = (count + kRows - 1) / kRows;
  const int rows = (count + tiles - 1) / tiles;
  tile.first = tile.first / kRows * rows;
  tile.left = min(count - tile.first, rows);
  return true;
}

// Stores a tile. Its first word is the expert, or kNoTile.
__device__ __forceinline__ void store_tile(uint32_t at, const Tile& tile) {
  hopper::store_shared(at, make_uint4(tile.expert, tile.first, tile.left, tile.group));
}

__device__ __forceinline__ Tile load_tile(uint32_t at) {
  const uint4 x = hopper::load_shared_uint4(at);
  return {static_cast<int>(x.x), static_cast<int>(x.y), static_cast<int>(x.z),
          static_cast<int>(x.w)};
}

// Returns the expert's list from the tile's first pair on.
template <typename Job>
__device__ __forceinline__ const int32_t* pairs_of(const Job& job, const Tile& tile) {
  return job.pairs + static_cast<int64_t>(tile.expert) * job.num_tokens + tile.first;
}

// Copies tile after tile, and tells the multiplying warpgroups when the last one is done.
//
// All 128 threads of the warpgroup that copies call it.
//
// Args:
//   taken: counter of tiles past the first one of each block; null if blocks have equal shares
//   slot: shared address of two numbers, a multiple of 8
//   find: finds the tile of a number, false past the last one
//   copy: copies all stages of a tile
template <typename Turn, typename Find, typename Copy>
__device__ __forceinline__ void copy_tiles(Turn turn, uint32_t* taken, uint32_t slot,
                                           uint32_t blocks, int thread, Find find, Copy copy) {
  uint32_t number = blockIdx.x;
  Tile tile;
  while (find(number, tile)) {
    // the counter's answer arrives while the tile is copied
    uint32_t next = 0;
    if (thread == 0 && taken != nullptr) next = atomicAdd(taken, 1u) + blocks;
    copy(tile, number, turn);
    if (taken == nullptr) {
      number += blocks;
      continue;
    }
    // two slots in turn: the written slot was read before the last barrier
    slot ^= 4;
    if (thread == 0) hopper::store_shared(slot, next);
    hopper::named_barrier(kCopierBarrier, 128);
    number = hopper::load_shared(slot);
  }
  hopper::barrier_wait(turn.is_free(), turn.parity ^ 1);
  if (thread == 0) {
    hopper::store_shared(turn.own_tile(), kNoTile);
    hopper::barrier_arrive(turn.is_full());
  }
  hopper::barrier_arrive(turn.is_full());
}

__device__ __forceinline__ float silu_times(float gate, float up) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float small = hopper::exp2_of(-fabsf(gate) * kLog2E);
  return gate * __fdividef(gate >= 0 ? 1.0f : small, 1.0f + small) * up;
}

#endif

}  // namespace fd_dsa::experts
