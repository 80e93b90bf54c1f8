// Sparse MLA for blocks of 64 heads: what a block holds in shared memory, and the warpgroup that
// brings tiles of keys there.
#pragma once

#include "cache_record.h"
#include "hopper.cuh"
#include "sparse_mla.h"

namespace fd_dsa::wide {

using namespace hopper;

constexpr int kHeads = 64, kKeys = 64;  // of a block, of a tile
constexpr int kThreads = 384;  // two warpgroups that compute, one that brings tiles

// An operand is nine blocks of 64 columns, 64 rows each, swizzled; the ninth holds what is roped.
constexpr uint32_t kBlock = 64 * 128, kOperand = 9 * kBlock, kRopeBlock = 8 * kBlock;
// Floats from a head's partial result to the next one's: neighbours in other banks.
constexpr int kPartStride = kRank + 8;

// Where things are in shared memory, in bytes.
constexpr uint32_t kQuery = 0, kTiles = kOperand, kFactors = 3 * kOperand;
constexpr uint32_t kTops = kFactors + 4 * kHeads;          // of either warpgroup
constexpr uint32_t kTotals = kTops + 2 * 4 * kHeads;       // of either warpgroup
constexpr uint32_t kShares = kTotals + 2 * 4 * kHeads;     // of the blocks of a cluster
constexpr uint32_t kSeen = kShares + 4 * kHeads;           // 64 bits a tile
constexpr uint32_t kLast = kSeen + 2 * 8;                  // of four warps
constexpr uint32_t kPlace = kLast + 4 * 4;
constexpr uint32_t kBarriers = kPlace + 4 * 4;
constexpr uint32_t kBytes = kBarriers + 8 * 8;
static_assert(kBytes <= 232448 && kHeads * kPartStride * 4 <= 2 * kOperand);

// Tile t is in buffer t % 2. Each half of its latents has a barrier for "there" and one for
// "free": half g is summed up, and freed, by warpgroup g.
__device__ __forceinline__ uint32_t tile_at(uint32_t base, int buffer) {
  return base + kTiles + buffer * kOperand;
}
__device__ __forceinline__ uint32_t there(uint32_t base, int buffer, int half) {
  return base + kBarriers + (buffer * 2 + half) * 8;
}
__device__ __forceinline__ uint32_t is_free(uint32_t base, int buffer, int half) {
  return there(base, buffer, half) + 32;
}
// What is roped comes with half 1, which is brought after half 0: both are free then. Once a tile
// is scored, its weights are in the roped block, where both warpgroups read them.

// Numbers of named barriers.
enum {
  kStart = 1,
  kScored,
  kFirstWeights,
  kSecondWeights,
  kOfFirst,
  kOfSecond,
  kOfCopiers,
  kOfComputing
};

// Blocks of 64 heads of a token; what is missing of the last is padding.
__host__ __device__ __forceinline__ int groups_of(const FdDsaSparseMla& job) {
  return (job.num_heads + kHeads - 1) / kHeads;
}

// The entries of a row that a block looks at.
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

// Arrivals that a half of a tile is there after: each warp's for what is stored, and one a thread
// for what is copied. Records are stored, rows of 16-bit values copied.
__device__ __forceinline__ int arrivals(bool of_records, int half) {
  return (of_records || half == 1 ? 4 * kWarpArrivals : 0) + (!of_records || half == 1 ? 128 : 0);
}

// A thread of the warpgroup. Warp w has rows 16w to 16w + 15 of each tile: lanes 0 to 7 know the
// slots of the first eight, lanes 16 to 23 those of the others.
struct Copier {
  const FdDsaSparseMla& job;
  Entries entries;
  uint32_t base;
  int warp, lane;
  // Entry of this lane's row of a tile, -1 where there is none. Nothing waits for it here.
  __device__ __forceinline__ int entry(int tile) const {
    const int mine = unknown(lane), at = tile * kKeys + warp * 16 + mine / 16 * 8 + mine % 16;
    return mine % 16 < 8 && at < entries.count ? __ldg(entries.slots + at) : -1;
  }

  // The slot that an entry names, -1 for none.
  __device__ __forceinline__ int slot_of(int entry) const {
    return static_cast<uint32_t>(entry) < static_cast<uint32_t>(job.num_slots) ? entry : -1;
  }

  // The end of this thread's share of the entries without those after the last slot.
  __device__ __forceinline__ int last_entry() const {
    // asked for together: in turn they would take longer than several tiles
    constexpr int kTogether = 8;
    int last = 0;
    for (int first = warp * 32 + lane; first < entries.count; first += 128 * kTogether) {
      int entry[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int at = first + i * 128;
        entry[i] = at < entries.count ? __ldg(entries.slots + at) : -1;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (slot_of(entry[i]) >= 0) last = first + i * 128 + 1;
      }
    }
    return last;
  }

  // Tiles up to the last slot; tells the warpgroups that compute.
  __device__ __forceinline__ int count_tiles(int last) const {
    last = __reduce_max_sync(~0u, last);
    if (lane == 0) store_shared(base + kLast + warp * 4, last);
    named_barrier(kOfCopiers, 128);
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

  // Copies the roped values of this warp's rows, each `bytes` long, `first` bytes after its start.
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

  // Marks which rows of the tile are keys.
  __device__ __forceinline__ void store_seen(int slot, int buffer) const {
    const uint32_t seen = __ballot_sync(~0u, slot >= 0);
    const uint16_t rows = seen | seen >> 8;
    if (lane == 0) store_shared(base + kSeen + buffer * 8 + warp * 2, rows);
  }
};

// Where the record of a slot was dequantized: asked for, and made of the answer.
struct Dequantized {
  const FdDsaSparseMla& job;
  int block, offset;

  __device__ __forceinline__ void ask(int slot) {
    const uint32_t size = job.block_size, of_slot = static_cast<uint32_t>(max(slot, 0)) / size;
    offset = slot < 0 ? -1 : slot - static_cast<int>(of_slot * size);
    block = __ldg(job.dequantized_blocks + of_slot);
  }

  // Row of the values, -1 for none.
  __device__ __forceinline__ int row() const {
    const int64_t at = int64_t{block} * job.block_size + offset;
    return offset >= 0 && block >= 0 && at < job.dequantized_slots ? static_cast<int>(at) : -1;
  }
};

// Tiles of bfloat16 latents, or of dequantized records, copied as they are.
template <bool kDequantized>
__device__ __forceinline__ void bring_rows(const Copier& copier) {
  const int lane = copier.lane;
  const void* const rows = kDequantized ? copier.job.dequantized : copier.job.cache;
  const char* const cache = static_cast<const char*>(rows) + lane * 16;
  const uint32_t first = tile_at(copier.base, 0) + lane / 8 * kBlock + copier.warp * (16 * 128) +
                         lane % 8 * 16;
  // entries are asked for two tiles ahead, where they were dequantized one
  Dequantized dequantized{copier.job, 0, 0};
  int entry = copier.entry(0), next = copier.entry(1);
  const int last = copier.last_entry();
  if constexpr (kDequantized) dequantized.ask(copier.slot_of(entry));
  const int tiles = copier.count_tiles(last);
  for (int t = 0; t < tiles; ++t) {
    const int place = kDequantized ? dequantized.row() : copier.slot_of(entry), buffer = t & 1;
    entry = next;
    if constexpr (kDequantized) dequantized.ask(copier.slot_of(entry));
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
        warp_arrive(there(copier.base, buffer, half), lane);
      }
      barrier_arrive_after_copies(there(copier.base, buffer, half));
    }
  }
  wait_for_copies();
}

// float16 values of two codes in half a word, times `scale` / 256; NaN stays NaN.
template <bool kUpper>
__device__ __forceinline__ uint32_t scaled(uint32_t word, uint32_t scale) {
  return times_halves(times_halves(values_of_codes<kUpper>(word), 0x1c001c00u), scale);
}

__device__ __forceinline__ uint4 scaled(uint32_t first, uint32_t second, uint32_t scale) {
  return {scaled<false>(first, scale), scaled<true>(first, scale), scaled<false>(second, scale),
          scaled<true>(second, scale)};
}

// Tiles of FP8 records, in float16. A lane takes 16 codes of each of eight rows: they are loaded a
// tile ahead, into the registers of those that were just stored.
struct Records {
  const Copier& copier;
  uint4 codes[2][8];   // of each half
  uint2 scales[2];     // of this lane's row of the next tile
  uint32_t of_scales;  // bytes of the scale among two in float16
  uint32_t row;        // where this lane's codes go in the first of its rows of the first tile
  bool swapped;

  __device__ __forceinline__ Records(const Copier& copier) : copier(copier) {
    const int lane = copier.lane, column = lane % 16;
    of_scales = column >= 8 ? 0x3232 : 0x1010;
    // lanes of two blocks meet in the same banks, unless one begins with the second 8 values
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

  // Stores what was loaded.
  template <int kHalf>
  __device__ __forceinline__ void store(int buffer) const {
    const uint32_t to = unknown(row) + buffer * kOperand + kHalf * 4 * kBlock;
    const uint32_t pair = pack_half(__uint_as_float(scales[kHalf].x) * 256.0f,
                                    __uint_as_float(scales[kHalf].y) * 256.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t scale = __byte_perm(__shfl_sync(~0u, pair, i, 16), 0, of_scales);
      const uint4 x = codes[kHalf][i];
      const uint32_t at = (to ^ i << 4) + i * 128;
      store_shared(at, scaled(swapped ? x.z : x.x, swapped ? x.w : x.y, scale));
      store_shared(at ^ 16, scaled(swapped ? x.x : x.z, swapped ? x.y : x.w, scale));
    }
  }

  // Brings half a tile, and loads the same half of the next one.
  template <int kHalf>
  __device__ __forceinline__ void bring(int tile, int slot, int next) {
    const int buffer = tile & 1;
    copier.wait(tile, kHalf);
    if constexpr (kHalf == 1) {
      copier.copy_rope(copier.job.cache, slot, tile_at(copier.base, buffer), kRecord, kRopeAt);
      copier.store_seen(slot, buffer);
    }
    store<kHalf>(buffer);
    warp_arrive(there(copier.base, buffer, kHalf), copier.lane);
    if constexpr (kHalf == 1) barrier_arrive_after_copies(there(copier.base, buffer, kHalf));
    load<kHalf>(next);
  }
};

__device__ __forceinline__ void bring_records(const Copier& copier) {
  Records records(copier);
  int slot = copier.slot_of(copier.entry(0)), next = copier.slot_of(copier.entry(1));
  const int last = copier.last_entry();
  records.load<0>(slot);
  records.load<1>(slot);
  const int tiles = copier.count_tiles(last);
  for (int t = 0; t < tiles; ++t) {
    const int third = copier.slot_of(copier.entry(t + 2));
    records.bring<0>(t, slot, next);
    records.bring<1>(t, slot, next);
    slot = next, next = third;
  }
  wait_for_copies();
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::wide
