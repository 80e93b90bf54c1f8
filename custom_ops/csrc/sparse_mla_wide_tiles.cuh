// Sparse MLA for blocks of 64 heads: the layout of shared memory, and the copying warpgroup.
#pragma once

#include "cache_record.h"
#include "sparse_mla.h"
#include "wgmma.cuh"

namespace fd_dsa::wide {

using namespace hopper;

constexpr int kHeads = 64, kKeys = 64;  // of a block, of a tile
constexpr int kThreads = 384;           // two computing warpgroups and a copying one

// Registers of a computing thread and of a thread that copies keys, which start with 168 each. FP8
// records pass through registers.
template <bool kFp8>
struct Registers {
  static constexpr int kComputeRegisters = kFp8 ? 192 : 216, kCopyRegisters = kFp8 ? 120 : 72;
  static_assert(2 * kComputeRegisters + kCopyRegisters == 3 * 168);
};

// An operand is nine blocks of 64 columns with 64 rows each, swizzled. The ninth block holds the
// roped values.
constexpr uint32_t kBlock = 64 * 128, kOperand = 9 * kBlock, kRopeBlock = 8 * kBlock;
// Floats between the partial results of two heads, which puts neighbours into different banks.
constexpr int kPartStride = kRank + 8;

// Offsets in shared memory, in bytes.
constexpr uint32_t kQuery = 0, kTiles = kOperand, kFactors = 3 * kOperand;
constexpr uint32_t kRowMaxOffset = kFactors + 4 * kHeads;     // of either warpgroup
constexpr uint32_t kTotals = kRowMaxOffset + 2 * 4 * kHeads;  // of either warpgroup
constexpr uint32_t kShares = kTotals + 2 * 4 * kHeads;        // of the blocks of a cluster
constexpr uint32_t kSeen = kShares + 4 * kHeads;              // 64 bits per tile
constexpr uint32_t kLast = kSeen + 2 * 8;                     // of four warps
constexpr uint32_t kPlace = kLast + 4 * 4;
constexpr uint32_t kBarriers = kPlace + 4 * 4;
constexpr uint32_t kBytes = kBarriers + 8 * 8;
static_assert(kBytes <= 232448 && kHeads * kPartStride * 4 <= 2 * kOperand);

// Tile t is in buffer t % 2. Each half of its latents has a barrier for "full" and one for "free".
// Warpgroup g sums up half g, and frees it.
__device__ __forceinline__ uint32_t tile_at(uint32_t base, int buffer) {
  return base + kTiles + buffer * kOperand;
}
__device__ __forceinline__ uint32_t is_full(uint32_t base, int buffer, int half) {
  return base + kBarriers + (buffer * 2 + half) * 8;
}
__device__ __forceinline__ uint32_t is_free(uint32_t base, int buffer, int half) {
  return is_full(base, buffer, half) + 32;
}
// The roped values come with half 1, which is copied after half 0, when both halves are free. Once
// a tile is scored, the roped block holds its weights, which both warpgroups read.

// Numbers of named barriers.
enum {
  kStart = 1,
  kScored,
  kFirstWeights,
  kSecondWeights,
  kFirstBarrier,
  kSecondBarrier,
  kCopierBarrier,
  kComputeBarrier
};

// Returns the blocks of 64 heads of a token. The last one may be padded.
__host__ __device__ __forceinline__ int groups_of(const FdDsaSparseMla& job) {
  return (job.num_heads + kHeads - 1) / kHeads;
}

// The entries of a row that a block reads.
struct Entries {
  const int32_t* slots;
  int count;
};

__device__ __forceinline__ Entries entries_of(const FdDsaSparseMla& job, int64_t token,
                                              int split, int splits) {
  const int tiles = (job.topk + kKeys - 1) / kKeys;
  const int each = (tiles + splits - 1) / splits * kKeys;
  const int begin = min(split * each, job.topk);
  return {job.slots + token * job.topk + begin, min(each, job.topk - begin)};
}

#if defined(FD_DSA_HOPPER)

// Returns the arrivals that fill a half of a tile: one per warp for stores, one per thread for
// copies.
//
// Records are stored, and rows of 16-bit values are copied.
__device__ __forceinline__ int arrivals(bool of_records, int half) {
  return (of_records || half == 1 ? 4 * kWarpArrivals : 0) + (!of_records || half == 1 ? 128 : 0);
}

// A thread of the copying warpgroup.
//
// Warp w has rows 16w to 16w + 15 of each tile. Lanes 0 to 7 have the slots of the first eight
// rows, and lanes 16 to 23 those of the others.
struct Copier {
  const FdDsaSparseMla& job;
  Entries entries;
  uint32_t base;
  int warp, lane;
  // Returns the entry of this lane's row of a tile, or -1 without one. The load is not waited for
  // here.
  __device__ __forceinline__ int entry(int tile) const {
    const int mine = unknown(lane), at = tile * kKeys + warp * 16 + mine / 16 * 8 + mine % 16;
    return mine % 16 < 8 && at < entries.count ? __ldg(entries.slots + at) : -1;
  }

  // Returns the slot of an entry, or -1 for an invalid one.
  __device__ __forceinline__ int slot_of(int entry) const {
    return static_cast<uint32_t>(entry) < static_cast<uint32_t>(job.num_slots) ? entry : -1;
  }

  // Returns the end of this thread's share of the entries, without those after the last slot.
  __device__ __forceinline__ int last_entry() const {
    // loaded together, because one after another they would take longer than several tiles
    constexpr int kAtOnce = 8;
    int last = 0;
    for (int first = warp * 32 + lane; first < entries.count; first += 128 * kAtOnce) {
      int entry[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * 128;
        entry[i] = at < entries.count ? __ldg(entries.slots + at) : -1;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (slot_of(entry[i]) >= 0) last = first + i * 128 + 1;
      }
    }
    return last;
  }

  // Counts the tiles up to the last slot, and publishes the count to the computing warpgroups.
  __device__ __forceinline__ int count_tiles(int last) const {
    last = __reduce_max_sync(~0u, last);
    if (lane == 0) store_shared(base + kLast + warp * 4, last);
    named_barrier(kCopierBarrier, 128);
    named_barrier_arrive(kStart, kThreads);
    return tiles_up_to_last(base);
  }

  static __device__ __forceinline__ int tiles_up_to_last(uint32_t base) {
    uint32_t last = 0;
    for (int i = 0; i < 4; ++i) last = max(last, load_shared(base + kLast + i * 4));
    return (last + kKeys - 1) / kKeys;
  }

  // Waits until a half of a tile's buffer is free.
  __device__ __forceinline__ void wait(int tile, int half) const {
    barrier_wait(is_free(base, tile & 1, half), (tile >> 1 & 1) ^ 1);
  }

  // Copies the roped values of this warp's rows, which are `bytes` long and have them at byte
  // `first`.
  __device__ __forceinline__ void copy_rope(const void* rows, int slot, uint32_t tile, int bytes,
                                            int first) const {
    const int part = unknown(lane) / 8, chunk = unknown(lane) % 8;
    const uint32_t to = tile + kRopeBlock + swizzled(warp * 16 + part, chunk);
    const char* const cache = static_cast<const char*>(rows) + first + chunk * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = __shfl_sync(~0u, slot, i / 2 * 16 + i % 2 * 4 + part);
      copy_16((to ^ i % 2 << 6) + i * 512, cache + static_cast<int64_t>(max(at, 0)) * bytes,
              at >= 0);
    }
  }

  // Marks the rows of the tile that are keys.
  __device__ __forceinline__ void store_seen(int slot, int buffer) const {
    const uint32_t seen = __ballot_sync(~0u, slot >= 0);
    const uint16_t rows = seen | seen >> 8;
    if (lane == 0) store_shared(base + kSeen + buffer * 8 + warp * 2, rows);
  }
};

// The location of a slot's dequantized record. Its load and its use are apart.
struct Dequantized {
  const FdDsaSparseMla& job;
  int block, offset;

  __device__ __forceinline__ void load(int slot) {
    const uint32_t size = job.block_size, of_slot = static_cast<uint32_t>(max(slot, 0)) / size;
    offset = slot < 0 ? -1 : slot - static_cast<int>(of_slot * size);
    block = __ldg(job.dequantized_blocks + of_slot);
  }

  // Returns the row of the values, or -1 without one.
  __device__ __forceinline__ int row() const {
    const int64_t at = int64_t{block} * job.block_size + offset;
    return offset >= 0 && block >= 0 && at < job.dequantized_slots ? static_cast<int>(at) : -1;
  }
};

// Copies tiles of bfloat16 latents or of dequantized records as they are.
template <bool kDequantized>
__device__ __forceinline__ void copy_rows(const Copier& copier) {
  const int lane = copier.lane;
  const void* const rows = kDequantized ? copier.job.dequantized : copier.job.cache;
  const char* const cache = static_cast<const char*>(rows) + lane * 16;
  const uint32_t first = tile_at(copier.base, 0) + lane / 8 * kBlock + copier.warp * (16 * 128) +
                         lane % 8 * 16;
  // entries are loaded two tiles ahead, and locations of dequantized records one tile ahead
  Dequantized dequantized{copier.job, 0, 0};
  int entry = copier.entry(0), next = copier.entry(1);
  const int last = copier.last_entry();
  if constexpr (kDequantized) dequantized.load(copier.slot_of(entry));
  const int tiles = copier.count_tiles(last);
  for (int t = 0; t < tiles; ++t) {
    const int place = kDequantized ? dequantized.row() : copier.slot_of(entry), buffer = t & 1;
    entry = next;
    if constexpr (kDequantized) dequantized.load(copier.slot_of(entry));
    next = copier.entry(t + 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = first + buffer * kOperand + half * 4 * kBlock;
      copier.wait(t, half);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int at = __shfl_sync(~0u, place, i / 8 * 16 + i % 8);
        const char* from = cache + static_cast<int64_t>(max(at, 0)) * (2 * kWidth) + half * 512;
        copy_16((row ^ (i & 7) << 4) + i * 128, from, at >= 0);
      }
      if (half == 1) {
        copier.copy_rope(rows, place, tile_at(copier.base, buffer), 2 * kWidth, 2 * kRank);
        copier.store_seen(place, buffer);
        warp_arrive(is_full(copier.base, buffer, half), lane);
      }
      barrier_arrive_after_copies(is_full(copier.base, buffer, half));
    }
  }
  wait_for_copies();
}

// Converts two codes in half a word to float16 times `scale` / 256. NaN stays NaN.
template <bool kUpper>
__device__ __forceinline__ uint32_t scaled(uint32_t word, uint32_t scale) {
  return times_halves(times_halves(values_of_codes<kUpper>(word), 0x1c001c00u), scale);
}

__device__ __forceinline__ uint4 scaled(uint32_t first, uint32_t second, uint32_t scale) {
  return {scaled<false>(first, scale), scaled<true>(first, scale), scaled<false>(second, scale),
          scaled<true>(second, scale)};
}

// Tiles of FP8 records, which become float16.
//
// A lane has 16 codes of each of eight rows. They are loaded a tile ahead, into the registers of
// the codes just stored.
struct Records {
  const Copier& copier;
  uint4 codes[2][8];        // of each half
  uint2 scales[2];          // of this lane's row of the next tile
  uint32_t scale_selector;  // byte selector of the lane's scale in a pair of float16
  uint32_t row;  // address of this lane's codes in the first of its rows of the first tile
  bool swapped;

  __device__ __forceinline__ Records(const Copier& copier) : copier(copier) {
    const int lane = copier.lane, column = lane % 16;
    scale_selector = column >= 8 ? 0x3232 : 0x1010;
    // lanes of two blocks use the same banks unless one starts with the second 8 values
    swapped = column / 4 & 1;
    row = tile_at(copier.base, 0) + column / 4 * kBlock + (copier.warp * 2 + lane / 16) * 1024 +
          (column % 4 * 2 + swapped) * 16;
  }

  template <int kHalf>
  __device__ __forceinline__ void load(int slot) {
    const char* const cache =
        static_cast<const char*>(copier.job.cache) + unknown(copier.lane) % 16 * 16 + kHalf * 256;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = __shfl_sync(~0u, slot, i, 16);
      codes[kHalf][i] = load_16(cache + static_cast<int64_t>(max(at, 0)) * kRecord, at >= 0);
    }
    scales[kHalf] = {0, 0};
    if (slot >= 0) {
      scales[kHalf] = __ldg(reinterpret_cast<const uint2*>(
          static_cast<const char*>(copier.job.cache) + static_cast<int64_t>(slot) * kRecord +
          kScalesAt + kHalf * 8));
    }
  }

  // Stores the loaded half.
  template <int kHalf>
  __device__ __forceinline__ void store(int buffer) const {
    const uint32_t to = unknown(row) + buffer * kOperand + kHalf * 4 * kBlock;
    const uint32_t pair = pack_half(__uint_as_float(scales[kHalf].x) * 256.0f,
                                    __uint_as_float(scales[kHalf].y) * 256.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t scale = __byte_perm(__shfl_sync(~0u, pair, i, 16), 0, scale_selector);
      const uint4 x = codes[kHalf][i];
      const uint32_t at = (to ^ i << 4) + i * 128;
      store_shared(at, scaled(swapped ? x.z : x.x, swapped ? x.w : x.y, scale));
      store_shared(at ^ 16, scaled(swapped ? x.x : x.z, swapped ? x.y : x.w, scale));
    }
  }

  // Stores half a tile, and loads the same half of the next one.
  template <int kHalf>
  __device__ __forceinline__ void store_and_load(int tile, int slot, int next) {
    const int buffer = tile & 1;
    copier.wait(tile, kHalf);
    if constexpr (kHalf == 1) {
      copier.copy_rope(copier.job.cache, slot, tile_at(copier.base, buffer), kRecord, kRopeAt);
      copier.store_seen(slot, buffer);
    }
    store<kHalf>(buffer);
    warp_arrive(is_full(copier.base, buffer, kHalf), copier.lane);
    if constexpr (kHalf == 1) barrier_arrive_after_copies(is_full(copier.base, buffer, kHalf));
    load<kHalf>(next);
  }
};

__device__ __forceinline__ void copy_records(const Copier& copier) {
  Records records(copier);
  int slot = copier.slot_of(copier.entry(0)), next = copier.slot_of(copier.entry(1));
  const int last = copier.last_entry();
  records.load<0>(slot);
  records.load<1>(slot);
  const int tiles = copier.count_tiles(last);
  for (int t = 0; t < tiles; ++t) {
    const int third = copier.slot_of(copier.entry(t + 2));
    records.store_and_load<0>(t, slot, next);
    records.store_and_load<1>(t, slot, next);
    slot = next, next = third;
  }
  wait_for_copies();
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::wide
