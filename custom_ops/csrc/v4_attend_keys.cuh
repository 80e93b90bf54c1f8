// Attention of DeepSeek-V4: the keys of a block's tokens, and the warpgroup that copies them.
#pragma once

#include "sparse_mla_wide_heads.cuh"
#include "v4_attend.h"

namespace fd_dsa::v4 {

using namespace wide;
using Job = FdDsaV4Attend;

// The rotated values and the exponents of a record, in bytes.
constexpr int kRotatedAt = kRank - kRope, kExponentsAt = kRotatedAt + 2 * kRope;
constexpr int kV4Record = kExponentsAt + kRank / kRope;
static_assert(kV4Record == 584 && kRotatedAt % 8 == 0 && kExponentsAt % 8 == 0);

#if defined(FD_DSA_HOPPER)

// The work of one block is every `gridDim.x`th of these items: a token and up to 64 of its heads.
struct Item {
  int64_t token;
  int first_head;

  __device__ __forceinline__ Item(int number, int groups)
      : token(number / groups), first_head(number % groups * kHeads) {}
};

// The numbers of keys that a token sees: those of its window, oldest first, then its entries.
struct Visible {
  int window, entries;

  // A row below 0 is padding.
  __device__ __forceinline__ Visible(const Job& job, int row, int position) {
    const int seen_by = row < 0 ? 0 : position + 1;
    window = min(seen_by, job.window);
    entries = job.pool == nullptr ? 0 : seen_by / job.ratio;
    if (job.slots != nullptr) entries = min(entries, job.topk);
  }
  __device__ __forceinline__ int count() const { return window + entries; }
  __device__ __forceinline__ int tiles() const { return (count() + kKeys - 1) / kKeys; }
};

// A lane's row of a tile. Warp w has rows 16w to 16w + 15 of each tile, and lanes i and i + 16 have
// row i.
struct TileRow {
  const char* key;  // null without a key
  // The four facts below share a register. There is none left for each.
  int facts;

  // Args:
  //   parity: of the phase in which the tile's buffer becomes free.
  static __device__ __forceinline__ TileRow of(int buffer, int parity, bool exists,
                                               bool is_record) {
    return {nullptr, buffer | parity << 1 | exists << 2 | is_record << 3};
  }
  __device__ __forceinline__ int buffer() const { return facts & 1; }
  __device__ __forceinline__ int parity() const { return facts >> 1 & 1; }
  __device__ __forceinline__ bool exists() const { return (facts & 4) != 0; }
  __device__ __forceinline__ bool is_record() const { return (facts & 8) != 0; }
};

// A row whose number comes from memory. Its load and its use are apart.
struct FoundRow {
  TileRow row;
  const void* from;  // null without a key
  int found, times, offset;  // times: 0 for keys of the window

  __device__ __forceinline__ TileRow resolved(const Job& job) const {
    const int64_t number = int64_t{found} * times + offset;
    const bool is_copy = job.is_fp8 != 0 && !row.is_record();
    const int entries = is_copy ? job.num_plain_slots : job.num_slots;
    const bool is_key = from != nullptr && (times == 0 || (number >= 0 && number < entries));
    const int bytes = row.is_record() ? kV4Record : 2 * kRank;
    TileRow result = row;
    result.key = is_key ? static_cast<const char*>(from) + number * bytes : nullptr;
    return result;
  }
};

// Asks the L2 cache for the queries of an item. 128 threads have lines of 128 bytes.
__device__ __forceinline__ void prefetch_queries(const Job& job, const Item& item, int thread) {
  const int heads = min(job.num_heads - item.first_head, kHeads);
  const char* const from = static_cast<const char*>(job.q) +
                           (item.token * job.q_stride + int64_t{item.first_head} * kRank) * 2;
  for (int line = thread; line < heads * (2 * kRank / 128); line += 128) prefetch(from + line * 128);
}

// A walk over the tiles of all items of a block, as if they were those of one token.
struct TileWalk {
  const Job& job;
  int groups, warp, lane;
  int number, token = 0;  // of the item
  int row = -1, position = 0;
  int begin = 0;  // first key of this step, counted from the end of the window, as entries are
  int window = 0, count = 0, tile = 0;
  int parities = 3;  // bit b: of the phase in which buffer b becomes free
  bool is_record = false;

  __device__ __forceinline__ TileWalk(const Job& job, int groups, int warp, int lane)
      : job(job), groups(groups), warp(warp), lane(lane),
        number(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  // Goes to the next item, and returns false without one.
  __device__ __forceinline__ bool next_item() {
    number += static_cast<int>(gridDim.x), tile = 0, count = 0;
    if (number >= job.num_tokens * groups) return false;
    const Item item(number, groups);
    token = static_cast<int>(item.token);
    row = __ldg(job.rows + token), position = __ldg(job.positions + token);
    prefetch_queries(job, item, warp * 32 + lane);
    const Visible visible(job, row, position);
    window = visible.window, count = visible.count();
    const int at = max(row, 0);
    begin = __ldg(job.starts + at) - token - 1;
    is_record = job.is_fp8 != 0 && (job.is_plain == nullptr || __ldg(job.is_plain + at) == 0);
    return true;
  }

  // Starts to find this lane's row of the next tile.
  //
  // All paths have one load, because a choice between its result and others would wait for it. The
  // load does not wait for that of `begin`.
  __device__ __forceinline__ FoundRow next() {
    bool exists = true;
    while (exists && tile * kKeys >= count) exists = next_item();
    const int i = tile * kKeys + warp * 16 + lane % 16, buffer = tile & 1;
    const int parity = parities >> buffer & 1;
    parities ^= 1 << buffer, ++tile;
    const bool is_copy = job.is_fp8 != 0 && !is_record;
    // below 0 in the window
    const int entry = i - window, place = position + 1 + entry;
    const bool is_key = exists && i < count, is_entry = is_key && entry >= 0;
    // an address that may be read
    const int32_t* at = job.rows;
    int times = 0, offset = 0;
    if (is_entry && job.slots != nullptr) {
      at = job.slots + int64_t{token} * job.topk + entry, times = 1;
    } else if (is_entry) {
      at = job.block_table + int64_t{row} * job.table_width + entry / job.per_block;
      times = job.per_block, offset = entry % job.per_block;
    }
    const int found = __ldg(at);
    const void* from = nullptr;
    if (is_entry) {
      from = is_copy ? job.plain_pool : job.pool;
    } else if (is_key && entry >= begin) {
      from = is_copy ? job.plain_keys : job.keys;
      offset = token + 1 + entry;
    } else if (is_key) {
      from = is_copy ? job.plain_ring : job.ring;
      offset = row * job.ring_rows + place % job.ring_rows;
    }
    return {TileRow::of(buffer, parity, exists, is_record), from, found, times, offset};
  }
};

// Returns the address of the key in row `row` of this warp, or null.
__device__ __forceinline__ const char* key_of(const char* from, int row) {
  const auto key = __shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), row);
  return reinterpret_cast<const char*>(key);
}

// A thread of the copying warpgroup.
//
// It copies bfloat16 keys as they are. Records become bfloat16: a lane has 8 codes of each row, and
// loads those of the next tile into the registers of the codes just stored.
//
// Args:
//   kRecords: true if there may be records.
template <bool kRecords>
struct Copier {
  const Job& job;
  uint32_t base;
  int warp, lane;
  TileRow now, next;
  uint2 codes[2][16];  // of each half
  uint2 exponents, next_exponents;  // of this lane's row

  // Codes of half 1 are in the first 24 lanes. A branch around the loads would wait for them.
  template <int kHalf>
  __device__ __forceinline__ void load() {
    if constexpr (kRecords) {
      const int at = kHalf * 256 + lane * 8;
      const bool is_code = next.is_record() && at < kRotatedAt;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const char* const key = key_of(next.key, i);
        codes[kHalf][i] = load_8(key + at, key != nullptr && is_code);
      }
    }
  }

  // Returns an address that may be read, whether or not there is a key.
  __device__ __forceinline__ const char* any(const char* key) const {
    return key != nullptr ? key : static_cast<const char*>(job.keys);
  }

  template <int kHalf>
  __device__ __forceinline__ void copy_values(uint32_t tile) const {
    const uint32_t to =
        tile + (kHalf * 4 + lane / 8) * kBlock + warp * (16 * 128) + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const char* const key = key_of(now.key, i);
      copy_16((to ^ (i & 7) << 4) + i * 128, any(key) + kHalf * 512 + lane * 16, key != nullptr);
    }
  }

  // Rows are in fours without a branch, so that their instructions do not wait for each other.
  template <int kHalf>
  __device__ __forceinline__ void store_codes(uint32_t tile) const {
    constexpr int kAtOnce = 4;
    const int group = kHalf * 4 + lane / 8;
    const uint32_t to = tile + group * kBlock + warp * (16 * 128) + lane % 8 * 16;
#pragma unroll
    for (int first = 0; first < 16; first += kAtOnce) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const uint32_t word =
            __shfl_sync(~0u, kHalf == 0 ? exponents.x : exponents.y, first + k);
        const uint32_t power = word >> lane / 8 * 8 & 0xff, scale = power << 7 | power << 23;
        const uint2 x = codes[kHalf][first + k];
        values[k] = {bfloat16_of_codes<false>(x.x, scale), bfloat16_of_codes<true>(x.x, scale),
                     bfloat16_of_codes<false>(x.y, scale), bfloat16_of_codes<true>(x.y, scale)};
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int row = first + k;
        store_shared_if(group < 7, (to ^ (row & 7) << 4) + row * 128, values[k]);
      }
    }
  }

  // Copies the rotated channels of this warp's records to their block, 8 bytes at a time.
  __device__ __forceinline__ void copy_rotated(uint32_t block) const {
    const int chunk = unknown(lane) % 16, first = unknown(lane) / 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i * 2 + first;
      const char* const key = key_of(now.key, row);
      copy_few<8>(block + swizzled(warp * 16 + row, chunk / 2) + chunk % 2 * 8,
                  any(key) + kRotatedAt + chunk * 8, key != nullptr);
    }
  }

  // Fills a half of a tile, and loads the same half of the next one.
  template <int kHalf>
  __device__ __forceinline__ void fill() {
    const uint32_t tile = tile_at(base, now.buffer()), full = is_full(base, now.buffer(), kHalf);
    barrier_wait(is_free(base, now.buffer(), kHalf), now.parity());
    if (kRecords && now.is_record()) {
      if constexpr (kHalf == 1) copy_rotated(tile + 7 * kBlock);
      store_codes<kHalf>(tile);
    } else {
      copy_values<kHalf>(tile);
    }
    if constexpr (kHalf == 1) {
      const uint32_t seen = __ballot_sync(~0u, now.key != nullptr);
      const uint32_t to = base + kSeen + now.buffer() * 8 + warp * 2;
      if (lane == 0) store_shared(to, static_cast<uint16_t>(seen));
    }
    warp_arrive(full, lane);
    barrier_arrive_after_copies(full);
    load<kHalf>();
  }

  __device__ __forceinline__ void go_on(TileWalk& walk, FoundRow& found) {
    next = found.resolved(job);
    found = walk.next();
    if constexpr (kRecords) {
      next_exponents = load_8(next.key + kExponentsAt, next.is_record() && next.key != nullptr);
    }
  }

  __device__ __forceinline__ void run(int groups) {
    TileWalk walk(job, groups, warp, lane);
    FoundRow found = walk.next();
    go_on(walk, found);
    load<0>(), load<1>();
    while (next.exists()) {
      now = next, exponents = next_exponents;
      go_on(walk, found);
      fill<0>(), fill<1>();
    }
    wait_for_copies();
  }
};

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::v4
