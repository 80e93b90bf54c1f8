// Sparse MLA for few heads: the warps that copy records to shared memory, ahead of the others.
#ifndef FD_DSA_SPARSE_MLA_NARROW_COPY_CUH
#define FD_DSA_SPARSE_MLA_NARROW_COPY_CUH

#include "sparse_mla_narrow_layout.cuh"
#include "sparse_mla_values.cuh"

namespace fd_dsa::narrow {

// What is copied in the place of a slot that is none.
__device__ const uint4 kNothing[kRecord / 16] = {};

#if defined(FD_DSA_HOPPER)

// One thread; each tile is read by one warpgroup.
template <typename Shape>
__device__ __forceinline__ void init_barriers(uint32_t base) {
  for (int stage = 0; stage < Shape::kStages; ++stage) {
    for (int group = 0; group < Shape::kFulls; ++group) {
      barrier_init(Shape::full(base, stage, group), kCopyWarps);
    }
    barrier_init(Shape::empty(base, stage), kWarpArrivals * 4);
  }
  barriers_ready();
}

// The tiles of a token that a block has: every `step`th from `first` on.
struct Tiles {
  int32_t first, step, end;
};

// What a block works on, and a thread's place in it.
struct Place {
  uint32_t base, blocks, rank;
  int warp, lane;
  int64_t token;
  Tiles tiles;
};

// All threads of a block, at its beginning.
template <typename Shape>
__device__ __forceinline__ Place begin(const FdDsaSparseMla& job) {
  const uint32_t base = shared_address(shared_memory());
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t blocks = job.splits, rank = blockIdx.x % blocks;
  const Tiles tiles = {static_cast<int32_t>(rank), static_cast<int32_t>(blocks),
                       (job.topk + kTile - 1) / kTile};
  if (threadIdx.x == 0) init_barriers<Shape>(base);
  __syncthreads();
  return {base, blocks, rank, warp, lane, blockIdx.x / blocks, tiles};
}

// Copies a quarter of each tile of a token, as soon as there is room.
template <typename Shape>
__device__ __forceinline__ void copy_tiles(const FdDsaSparseMla& job, int64_t token, uint32_t base,
                                           const Tiles tiles, int warp, int lane) {
  constexpr int kMine = kTile / kCopyWarps;
  const int32_t* slots = job.slots + token * job.topk;
  const unsigned char* cache = static_cast<const unsigned char*>(job.cache);
  const uint32_t num_slots = static_cast<uint32_t>(job.num_slots);
  auto slot_at = [&](int32_t tile, int32_t i) {
    const int32_t entry = tile * kTile + i;
    return tile < tiles.end && entry < job.topk ? __ldcs(slots + entry) : -1;
  };
  // all lanes look at the tile's slots, the first 16 copy
  int32_t low = slot_at(tiles.first, lane), high = slot_at(tiles.first, lane + 32);
  uint32_t stage = 0, parity = 1;
  int group = 0;
  for (int32_t tile = tiles.first; tile < tiles.end; tile += tiles.step) {
    const int32_t next_low = slot_at(tile + tiles.step, lane);
    const int32_t next_high = slot_at(tile + tiles.step, lane + 32);
    const uint32_t low_mask = __ballot_sync(~0u, static_cast<uint32_t>(low) < num_slots);
    const uint32_t high_mask = __ballot_sync(~0u, static_cast<uint32_t>(high) < num_slots);
    const bool any = (low_mask | high_mask) != 0;
    const int32_t slot =
        __shfl_sync(~0u, warp < 2 ? low : high, (warp * kMine + lane % kMine) % 32);
    const bool is_slot = static_cast<uint32_t>(slot) < num_slots;
    const uint32_t full = Shape::full(base, stage, group);
    const uint32_t to = base + Shape::kRing + stage * kTileBytes + warp * (kMine * kRecord);
    barrier_wait(Shape::empty(base, stage), parity);
    // an empty tile may be passed on, and the barrier with it, as soon as lane 0 has arrived
    __syncwarp();
    if (lane == 0) {
      if (warp == 0) {
        store_shared(base + Shape::kMasks + stage * 8, low_mask);
        store_shared(base + Shape::kMasks + stage * 8 + 4, high_mask);
      }
      if (any) barrier_arrive_expecting(full, kMine * kRecord);
      else barrier_arrive(full);
    }
    __syncwarp();
    if (any && lane < kMine) {
      const void* nothing = kNothing;
      copy_bulk(to + lane * kRecord, is_slot ? cache + slot * int64_t{kRecord} : nothing, kRecord,
                full);
    }
    low = next_low;
    high = next_high;
    group ^= 1;
    if (++stage == Shape::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// All that the warps which copy do; `first` is the first of them.
template <typename Shape>
__device__ __forceinline__ void copy_and_wait(const FdDsaSparseMla& job, const Place& my,
                                              int first) {
  fewer_registers<Shape::kFew>();
  copy_tiles<Shape>(job, my.token, my.base, my.tiles, my.warp - first, my.lane);
  if (my.blocks == 1) return;
  // before the others of the cluster read here, and after
  __syncwarp();
  cluster_sync();
  cluster_sync();
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_COPY_CUH
