// Sparse MLA for 1 to 32 heads over FP8 records, on Hopper: code shared by both kernels.
//
// It holds the tiles, the warps that copy them, and the sum over a cluster.
//
// Keys are the rows of both GEMMs, so no row is padding: scores^T = K Q^T and out^T = V^T P^T.
// Records are in shared memory as stored. Each e4m3 code becomes float16, which holds it exactly,
// on its way into registers, once in a row and once in a column. Scales do not multiply latents.
// They multiply the scores over 128 latents and the weights of 128 latents. Blocks that share a
// token are a cluster. They add up their partial results through each other's shared memory, in a
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
// Strides in floats that put the threads of a warp into different banks.
constexpr int kSumStride = kTile + 4, kWeightStride = kTile + 16, kPartStride = kRank + 4;

// Numbers of named barriers: one per computing warpgroup, and those of both.
enum { kFirstBarrier = 1, kSecondBarrier, kBothBarrier, kNextBothBarrier };

// The zeros that are copied for a slot of -1.
__device__ const uint4 kZeroRecord[kRecord / 16] = {};

#if defined(FD_DSA_HOPPER)

// ---- copies

// The tiles of a token that a block has: every `step`th from `first` on.
struct Tiles {
  int32_t first, step, end;
};

// The work of a block, and the indices of a thread in it.
struct Place {
  uint32_t base, blocks, rank;
  int warp, lane;
  int64_t token;
  Tiles tiles;
};

// Initialises a block; all its threads call it first.
template <typename Shape>
__device__ __forceinline__ Place begin(const FdDsaSparseMla& job) {
  const uint32_t base = shared_address(shared_memory());
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t blocks = job.splits, rank = blockIdx.x % blocks;
  const Tiles tiles = {static_cast<int32_t>(rank), static_cast<int32_t>(blocks),
                       (job.topk + kTile - 1) / kTile};
  if (threadIdx.x == 0) {
    // one warpgroup reads each tile
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      for (int group = 0; group < Shape::kFulls; ++group) {
        barrier_init(Shape::full(base, stage, group), kCopyWarps);
      }
      barrier_init(Shape::empty(base, stage), kWarpArrivals * 4);
    }
    barriers_ready();
  }
  wait_for_inputs();
  start_next();
  __syncthreads();
  return {base, blocks, rank, warp, lane, blockIdx.x / blocks, tiles};
}

// Copies a quarter of each tile of a token as soon as its stage is empty.
template <typename Shape>
__device__ __forceinline__ void copy_tiles(const FdDsaSparseMla& job, int64_t token, uint32_t base,
                                           const Tiles tiles, int warp, int lane) {
  constexpr int kWarpKeys = kTile / kCopyWarps;
  const int32_t* slots = job.slots + token * job.topk;
  const unsigned char* cache = static_cast<const unsigned char*>(job.cache);
  const uint32_t num_slots = static_cast<uint32_t>(job.num_slots);
  auto slot_at = [&](int32_t tile, int32_t i) {
    const int32_t entry = tile * kTile + i;
    return tile < tiles.end && entry < job.topk ? __ldcs(slots + entry) : -1;
  };
  // all lanes read the tile's slots, and the first 16 copy records
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
        __shfl_sync(~0u, warp < 2 ? low : high, (warp * kWarpKeys + lane % kWarpKeys) % 32);
    const bool is_slot = static_cast<uint32_t>(slot) < num_slots;
    const uint32_t full = Shape::full(base, stage, group);
    const uint32_t to = base + Shape::kRing + stage * kTileBytes + warp * (kWarpKeys * kRecord);
    barrier_wait(Shape::empty(base, stage), parity);
    // once lane 0 has arrived, the other warps may release an empty tile and reuse its barrier
    __syncwarp();
    if (lane == 0) {
      if (warp == 0) {
        store_shared(base + Shape::kMasks + stage * 8, low_mask);
        store_shared(base + Shape::kMasks + stage * 8 + 4, high_mask);
      }
      if (any) {
        barrier_arrive_expecting(full, kWarpKeys * kRecord);
      } else {
        barrier_arrive(full);
      }
    }
    __syncwarp();
    if (any && lane < kWarpKeys) {
      const void* zeros = kZeroRecord;
      copy_bulk(to + lane * kRecord, is_slot ? cache + slot * int64_t{kRecord} : zeros, kRecord,
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

// Runs a copying warp; `first` is the index of the first copying warp.
template <typename Shape>
__device__ __forceinline__ void copy_and_wait(const FdDsaSparseMla& job, const Place& place,
                                              int first) {
  fewer_registers<Shape::kCopyRegisters>();
  copy_tiles<Shape>(job, place.token, place.base, place.tiles, place.warp - first, place.lane);
  if (place.blocks == 1) return;
  // the barriers before and after the other warps of the cluster read here
  __syncwarp();
  cluster_sync();
  cluster_sync();
}

// ---- numbers

__device__ __forceinline__ uint32_t largest_magnitude(uint32_t x) {
  return max(x & 0x7fffu, x >> 16 & 0x7fffu);
}

// Returns the largest of a warp's numbers, or NaN if there is one.
__device__ __forceinline__ float warp_max(float x) {
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

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Separates the stores of both warpgroups from their reads.
//
// One barrier orders them. racecheck misses the order for some first reads after one barrier, but
// sees it after two.
__device__ __forceinline__ void exchange_barrier() {
  named_barrier_apart(kBothBarrier, 256);
  named_barrier_apart(kNextBothBarrier, 256);
}

// Adds up the results of the warpgroups of all blocks of a token. Each block adds a part of the
// numbers.
template <typename Shape>
__device__ __forceinline__ void combine(const FdDsaSparseMla& job, int64_t token, uint32_t base,
                                        uint32_t rank, uint32_t blocks) {
  constexpr uint32_t kThreads = Shape::kGroups * 128;
  constexpr int kParts = Shape::kParts, kAtOnce = 4 / kParts;
  // all blocks have stored their results
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
        // past the last block: the first block again, with weight zero
        const uint32_t peer = address_at_rank(base, first + r < blocks ? first + r : 0);
#pragma unroll
        for (int w = 0; w < kParts; ++w) {
          stats[r][w] = load_cluster_float2(peer + Shape::kStats + (w * Shape::kHeads + head) * 8);
          x[r][w] = load_cluster_float4(peer + Shape::kRing + w * Shape::kPartBytes +
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
  // blocks stay until the others have read their memory
  __syncwarp();
  cluster_sync();
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow
