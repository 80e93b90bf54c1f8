// Sparse MLA for 1 to 32 heads over FP8 records, on Hopper: what both of its kernels share, which is
// tiles, the warps that copy them, and the sum over a cluster.
//
// Keys are the rows of both products, so that no row is padding: scores^T = K Q^T and
// out^T = V^T P^T. Records are in shared memory as stored; e4m3 codes become float16, which holds
// them exactly, on their way into registers, once as rows and once as columns. Scales never touch
// latents: they multiply the scores over 128 latents, and the weights of 128 latents. Blocks that
// share a token are a cluster; they add up what they have through each other's shared memory, in a
// fixed order.
#pragma once

#include "cache_record.h"
#include "hopper.cuh"
#include "sparse_mla.h"

namespace fd_dsa::narrow {

using namespace hopper;

constexpr int kTile = 64;  // keys
constexpr int kSixteens = kTile / 16;
constexpr int kTileBytes = kTile * kRecord;
constexpr int kCopyWarps = 4;
// Strides in floats, such that threads of a warp are in different banks.
constexpr int kSumStride = kTile + 4, kWeightStride = kTile + 16, kPartStride = kRank + 4;

// Numbers of named barriers: of each warpgroup that computes, and of both.
enum { kOfFirst = 1, kOfSecond, kOfBoth, kOfBothNext };

// What is copied for a slot of -1.
__device__ const uint4 kNothing[kRecord / 16] = {};

#if defined(FD_DSA_HOPPER)

// ---- copies

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
  if (threadIdx.x == 0) {
    // each tile is read by one warpgroup
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      for (int group = 0; group < Shape::kFulls; ++group) {
        barrier_init(Shape::full(base, stage, group), kCopyWarps);
      }
      barrier_init(Shape::empty(base, stage), kWarpArrivals * 4);
    }
    barriers_ready();
  }
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

// ---- numbers

__device__ __forceinline__ uint32_t largest_magnitude(uint32_t x) {
  return max(x & 0x7fffu, x >> 16 & 0x7fffu);
}

// The largest of a warp's numbers; NaN where there is one.
__device__ __forceinline__ float largest_of_warp(float x) {
  const int32_t bits = __float_as_int(x);
  const int32_t top = __reduce_max_sync(~0u, bits >= 0 ? bits : bits ^ 0x7fffffff);
  return __int_as_float(top >= 0 ? top : top ^ 0x7fffffff);
}

// ---- results

__device__ __forceinline__ void store_out(const FdDsaSparseMla& job, int64_t at, float4 x) {
  if (job.out_is_bfloat16 != 0) {
    __stcs(reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(job.out) + at),
           make_uint2(pack_bfloat16(x.x, x.y), pack_bfloat16(x.z, x.w)));
  } else {
    __stcs(reinterpret_cast<float4*>(static_cast<float*>(job.out) + at), x);
  }
}

__device__ __forceinline__ float lse_of(float top, float total) {
  return total == 0.0f ? -INFINITY : (top + log2f(total)) * 0.6931471805599453f;
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// After what both warpgroups stored, before either reads what the other did. One barrier orders
// them; racecheck does not see that for some first reads after one, and does after two.
__device__ __forceinline__ void exchange_barrier() {
  named_barrier_apart(kOfBoth, 256);
  named_barrier_apart(kOfBothNext, 256);
}

// Adds up what warpgroups of all blocks of a token have: a block does some of the numbers.
template <typename Shape>
__device__ __forceinline__ void combine(const FdDsaSparseMla& job, int64_t token, uint32_t base,
                                        uint32_t rank, uint32_t blocks) {
  constexpr uint32_t kThreads = Shape::kGroups * 128;
  constexpr int kParts = Shape::kParts, kAtOnce = 4 / kParts;
  // what others read is there
  __syncwarp();
  cluster_sync();
  const uint32_t work = static_cast<uint32_t>(job.num_heads) * (kRank / 4);
  for (uint32_t i = rank * kThreads + threadIdx.x; i < work; i += blocks * kThreads) {
    const uint32_t head = i / (kRank / 4), column = i % (kRank / 4) * 4;
    float top = -INFINITY, total = 0.0f;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (uint32_t first = 0; first < blocks; first += kAtOnce) {
      float2 stats[kAtOnce][kParts];
      float4 x[kAtOnce][kParts];
      float now = top;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        // past the last block: the first one again, which then counts nothing
        const uint32_t there = address_at_rank(base, first + r < blocks ? first + r : 0);
#pragma unroll
        for (int w = 0; w < kParts; ++w) {
          stats[r][w] =
              load_cluster_float2(there + Shape::kStats + (w * Shape::kHeads + head) * 8);
          x[r][w] = load_cluster_float4(there + Shape::kRing + w * Shape::kPartBytes +
                                        (head * kPartStride + column) * 4);
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
        for (int w = 0; w < kParts; ++w) {
          if (first + r >= blocks) stats[r][w].x = -INFINITY;
          now = fmaxf(now, stats[r][w].x);
        }
      }
      const float from = now == -INFINITY ? 0.0f : now, less = exp2_of(top - from);
      total *= less;
      sum = make_float4(sum.x * less, sum.y * less, sum.z * less, sum.w * less);
      top = now;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
        for (int w = 0; w < kParts; ++w) {
          const float share = exp2_of(stats[r][w].x - from);
          total = fmaf(stats[r][w].y, share, total);
          sum = make_float4(fmaf(x[r][w].x, share, sum.x), fmaf(x[r][w].y, share, sum.y),
                            fmaf(x[r][w].z, share, sum.z), fmaf(x[r][w].w, share, sum.w));
        }
      }
    }
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
    const int64_t row = token * job.num_heads + head;
    store_out(job, row * kRank + column,
              make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor));
    if (column == 0 && job.lse != nullptr) job.lse[row] = lse_of(top, total);
  }
  // nobody goes while others read here
  __syncwarp();
  cluster_sync();
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow
