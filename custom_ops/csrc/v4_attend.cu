// Attention of DeepSeek-V4 over bfloat16 keys or FP8 records, for blocks of 64 heads.
//
// A block has all keys of a token and 64 of its heads. It works like a block of sparse_mla_wide.cu:
// one warpgroup copies tiles of 64 keys to shared memory, and two compute. Keys differ in two ways
// from latents of MLA. They have no roped values beside them, because the last channels of a key
// are rotated in place. And they come from three tensors: the step's own keys, the ring of the
// row's older keys, and the pool of entries. Records become bfloat16 on their way to shared memory,
// without a loss.
//
// Queries are multiplied as they are, apart from their rotated channels. Their RMSNorm is a factor
// of the scores.
#include "v4_attend.h"

#include "sparse_mla_launch.cuh"
#include "sparse_mla_wide_heads.cuh"

namespace fd_dsa::v4 {

using namespace wide;
using Job = FdDsaV4Attend;

// The rotated values and the exponents of a record, in bytes.
constexpr int kRotatedAt = kRank - kRope, kExponentsAt = kRotatedAt + 2 * kRope;
constexpr int kV4Record = kExponentsAt + kRank / kRope;
static_assert(kV4Record == 584 && kRotatedAt % 8 == 0 && kExponentsAt % 8 == 0);

inline int groups_of(const Job& job) { return (job.num_heads + kHeads - 1) / kHeads; }

#if defined(FD_DSA_HOPPER)

constexpr int kPairs = kRope / 2;  // that are rotated

template <int kGroup>
using State = ComputeWarpgroup<false, kGroup, false>;

// The keys of a token: those of its window, oldest first, then its entries.
struct Keys {
  const Job& job;
  int64_t token;
  int row, position, oldest, begin, window, count;

  __device__ __forceinline__ Keys(const Job& job, int64_t token) : job(job), token(token) {
    row = __ldg(job.rows + token);
    position = __ldg(job.positions + token);
    const int seen_by = row < 0 ? 0 : position + 1;
    window = min(seen_by, job.window);
    oldest = seen_by - window;
    int entries = job.pool == nullptr ? 0 : seen_by / job.ratio;
    if (job.slots != nullptr) entries = min(entries, job.topk);
    count = window + entries;
    // position of the row's first token in this step
    begin = row < 0 ? 0 : position - static_cast<int>(token - __ldg(job.starts + row));
  }

  __device__ __forceinline__ int tiles() const { return (count + kKeys - 1) / kKeys; }

  // Returns what memory says about key i: its slot or its block. The load is not waited for here.
  __device__ __forceinline__ int load(int i) const {
    const int entry = i - window;
    if (entry < 0 || i >= count) return 0;
    return job.slots != nullptr
               ? __ldg(job.slots + token * job.topk + entry)
               : __ldg(job.block_table + int64_t{row} * job.table_width + entry / job.per_block);
  }

  // Returns the address of key i, for which `load` has returned `found`, or null without a key.
  __device__ __forceinline__ const char* at(int i, int found) const {
    if (i >= count) return nullptr;
    const int entry = i - window, place = oldest + i;
    const void* from = job.pool;
    int64_t number;
    if (entry >= 0) {
      number = job.slots != nullptr || found < 0
                   ? int64_t{found}
                   : int64_t{found} * job.per_block + entry % job.per_block;
      if (number < 0 || number >= job.num_slots) return nullptr;
    } else if (place >= begin) {
      number = token - (position - place), from = job.keys;
    } else {
      number = int64_t{row} * job.ring_rows + place % job.ring_rows, from = job.ring;
    }
    return static_cast<const char*>(from) + number * (job.is_fp8 != 0 ? kV4Record : 2 * kRank);
  }
};

// Waits until a half of a tile's buffer is free.
__device__ __forceinline__ void wait_for(uint32_t base, int tile, int half) {
  barrier_wait(is_free(base, tile & 1, half), (tile >> 1 & 1) ^ 1);
}

// Returns the address of the key in row `row` of this warp, or null.
__device__ __forceinline__ const char* key_of(const char* from, int row) {
  const auto key = __shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), row);
  return reinterpret_cast<const char*>(key);
}

// Marks the rows of the tile that are keys.
__device__ __forceinline__ void store_seen(const char* from, uint32_t base, int buffer, int warp,
                                           int lane) {
  const uint32_t seen = __ballot_sync(~0u, from != nullptr);
  if (lane == 0) store_shared(base + kSeen + buffer * 8 + warp * 2, static_cast<uint16_t>(seen));
}

// Copies tiles of bfloat16 keys. Warp w has rows 16w to 16w + 15 of each, and lanes i and i + 16
// have row i.
__device__ __forceinline__ void copy_keys(const Keys& keys, uint32_t base, int warp, int lane) {
  const uint32_t first =
      tile_at(base, 0) + lane / 8 * kBlock + warp * (16 * 128) + lane % 8 * 16;
  const int mine = warp * 16 + lane % 16, tiles = keys.tiles();
  // slots and blocks are loaded two tiles ahead
  int found = keys.load(mine), next = keys.load(mine + kKeys);
  for (int t = 0; t < tiles; ++t) {
    const char* const from = keys.at(t * kKeys + mine, found);
    const int buffer = t & 1;
    found = next;
    next = keys.load((t + 2) * kKeys + mine);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = first + buffer * kOperand + half * 4 * kBlock;
      wait_for(base, t, half);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const char* const key = key_of(from, i);
        // an address that is not read
        const char* const source = key != nullptr ? key : static_cast<const char*>(keys.job.keys);
        copy_16((row ^ (i & 7) << 4) + i * 128, source + half * 512 + lane * 16, key != nullptr);
      }
      if (half == 1) {
        store_seen(from, base, buffer, warp, lane);
        warp_arrive(is_full(base, buffer, half), lane);
      }
      barrier_arrive_after_copies(is_full(base, buffer, half));
    }
  }
  wait_for_copies();
}

// Tiles of records, with the rows of warps and lanes as in `copy_keys`.
//
// A lane has 8 codes of each row. They are loaded a tile ahead, into the registers of the codes just
// stored.
struct Records {
  const Keys& keys;
  uint32_t base;
  int warp, lane;
  uint2 codes[2][16];   // of each half
  uint2 exponents[2];   // of this lane's row of this tile and the next one
  const char* rows[2];  // the same

  // Codes of half 1 are in the first 24 lanes.
  template <int kHalf>
  __device__ __forceinline__ void load(const char* from) {
    const int at = kHalf * 256 + unknown(lane) * 8;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const char* const key = key_of(from, i);
      codes[kHalf][i] = load_8(key + at, key != nullptr && at < kRotatedAt);
    }
  }

  // Stores a half of the tile, and loads the same half of the next one.
  template <int kHalf>
  __device__ __forceinline__ void store_and_load(int tile) {
    const int mine = unknown(lane), group = kHalf * 4 + mine / 8, buffer = tile & 1;
    const uint32_t to = tile_at(base, buffer) + group * kBlock + warp * (16 * 128) + mine % 8 * 16;
    wait_for(base, tile, kHalf);
    if constexpr (kHalf == 1) {
      copy_rotated(tile_at(base, buffer) + 7 * kBlock);
      store_seen(rows[0], base, buffer, warp, lane);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t low = __shfl_sync(~0u, exponents[0].x, i);
      const uint32_t high = __shfl_sync(~0u, exponents[0].y, i);
      const uint32_t power = (group < 4 ? low : high) >> group % 4 * 8 & 0xff;
      const uint32_t scale = power << 7 | power << 23;
      const uint2 x = codes[kHalf][i];
      if (group < 7) {
        store_shared((to ^ (i & 7) << 4) + i * 128,
                     uint4{bfloat16_of_codes<false>(x.x, scale), bfloat16_of_codes<true>(x.x, scale),
                           bfloat16_of_codes<false>(x.y, scale),
                           bfloat16_of_codes<true>(x.y, scale)});
      }
    }
    warp_arrive(is_full(base, buffer, kHalf), lane);
    if constexpr (kHalf == 1) barrier_arrive_after_copies(is_full(base, buffer, kHalf));
    load<kHalf>(rows[1]);
  }

  // Copies the rotated channels of this warp's rows to their block, 8 bytes at a time.
  __device__ __forceinline__ void copy_rotated(uint32_t block) const {
    const int chunk = unknown(lane) % 16, first = unknown(lane) / 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i * 2 + first;
      const char* const key = key_of(rows[0], row);
      const char* const source = key != nullptr ? key : static_cast<const char*>(keys.job.keys);
      copy_few<8>(block + swizzled(warp * 16 + row, chunk / 2) + chunk % 2 * 8,
                  source + kRotatedAt + chunk * 8, key != nullptr);
    }
  }

  __device__ __forceinline__ void load_exponents() {
    exponents[1] = load_8(rows[1] + kExponentsAt, rows[1] != nullptr);
  }

  __device__ __forceinline__ void run() {
    const int mine = warp * 16 + lane % 16, tiles = keys.tiles();
    rows[1] = keys.at(mine, keys.load(mine));
    int found = keys.load(mine + kKeys);
    load<0>(rows[1]);
    load<1>(rows[1]);
    load_exponents();
    for (int t = 0; t < tiles; ++t) {
      rows[0] = rows[1], exponents[0] = exponents[1];
      rows[1] = keys.at((t + 1) * kKeys + mine, found);
      found = keys.load((t + 2) * kKeys + mine);
      load_exponents();
      store_and_load<0>(t);
      store_and_load<1>(t);
    }
    wait_for_copies();
  }
};

__device__ __forceinline__ float square_sum(uint4 x) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum += low_of(words[i]) * low_of(words[i]) + high_of(words[i]) * high_of(words[i]);
  }
  return sum;
}

// Rotates four pairs by their angles.
__device__ __forceinline__ uint4 rotated(uint4 x, float4 cos, float4 sin) {
  const auto turn = [](uint32_t pair, float cos, float sin) {
    const float a = low_of(pair), b = high_of(pair);
    return pack_bfloat16(a * cos - b * sin, b * cos + a * sin);
  };
  return {turn(x.x, cos.x, sin.x), turn(x.y, cos.y, sin.y), turn(x.z, cos.z, sin.z),
          turn(x.w, cos.w, sin.w)};
}

// Writes the queries of a block as an operand, and the factor of each head's scores.
//
// The factor holds the RMSNorm, and 512^-0.5.
__device__ __forceinline__ void store_queries(const Keys& keys, int first_head, uint32_t base,
                                              int warp, int lane) {
  constexpr int kWarpHeads = 8;  // of a warp; all are loaded before the first is used
  constexpr int kFirstRotated = 32 - kRope / 8;
  const Job& job = keys.job;
  uint4 x[kWarpHeads][2];
#pragma unroll
  for (int i = 0; i < kWarpHeads; ++i) {
    const int head = first_head + warp * kWarpHeads + i;
    const auto* const row = reinterpret_cast<const uint4*>(
        static_cast<const uint16_t*>(job.q) + keys.token * job.q_stride +
        int64_t{head < job.num_heads ? head : 0} * kRank);
    x[i][0] = __ldg(row + lane);
    x[i][1] = __ldg(row + 32 + lane);
  }
  float4 cos = {1, 1, 1, 1}, sin = {0, 0, 0, 0};
  if (lane >= kFirstRotated) {
    const float* const angles = job.cos_sin + int64_t{max(keys.position, 0)} * kRope;
    cos = __ldg(reinterpret_cast<const float4*>(angles) + lane - kFirstRotated);
    sin = __ldg(reinterpret_cast<const float4*>(angles + kPairs) + lane - kFirstRotated);
  }
#pragma unroll
  for (int i = 0; i < kWarpHeads; ++i) {
    const int row = warp * kWarpHeads + i;
    float sum = square_sum(x[i][0]) + square_sum(x[i][1]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane >= kFirstRotated) x[i][1] = rotated(x[i][1], cos, sin);
    const uint32_t to = base + kQuery + lane / 8 * kBlock + swizzled(row, lane % 8);
    store_shared(to, x[i][0]);
    store_shared(to + 4 * kBlock, x[i][1]);
    if (lane == 0) {
      store_shared(base + kFactors + row * 4, kLog2E / sqrtf(sum + kRank * job.epsilon));
    }
  }
  publish_to_async();
}

// Divides the sums by their weights and the sink's, and reverts the rotation of the keys.
template <int kGroup>
__device__ __forceinline__ void finish_heads(const Keys& keys, int first_head,
                                             State<kGroup>& state) {
  const Job& job = keys.job;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int head = min(first_head + state.row(r), job.num_heads - 1);
    const float sink = exp2f(__ldg(job.sinks + head) * kLog2E - state.top[r]);
    // padding has no keys
    factor[r] = state.top[r] == -INFINITY ? 0.0f : 1.0f / (state.total[r] + sink);
  }
#pragma unroll
  for (int i = 0; i < 128; ++i) state.out[i] *= factor[i >> 1 & 1];
  if constexpr (kGroup == 1) {
    const float* const angles = job.cos_sin + int64_t{max(keys.position, 0)} * kRope;
#pragma unroll
    for (int j = 24; j < 32; ++j) {
      const int pair = (j - 24) * 4 + state.lane % 4;
      const float cos = __ldg(angles + pair), sin = __ldg(angles + kPairs + pair);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& x = state.out[j * 4 + r * 2];
        float& y = state.out[j * 4 + r * 2 + 1];
        const float a = x, b = y;
        x = a * cos + b * sin, y = b * cos - a * sin;
      }
    }
  }
}

// Quantises the results of a warp, 128 channels at a time, into rows of shared memory.
template <int kGroup>
__device__ __forceinline__ void quantize(const Keys& keys, int first_head, State<kGroup>& state,
                                         uint32_t to, uint32_t line) {
  const Job& job = keys.job;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = 0;
#pragma unroll
      for (int j = part * 16; j < part * 16 + 16; ++j) {
        // the values that a result without FP8 has
        const float* const x = state.out + j * 4 + r * 2;
        const uint32_t both = pack_bfloat16(x[0], x[1]);
        largest = fmaxf(largest, fmaxf(fabsf(low_of(both)), fabsf(high_of(both))));
      }
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      // the inverse of a power of two is exact
      const float scale = scale_of(largest, true), inverse = 1.0f / scale;
      const int head = first_head + state.row(r), group = head * 4 + kGroup * 2 + part;
      if (state.lane % 4 == 0 && head < job.num_heads) {
        job.scales[group * job.scale_stride + keys.token] = scale;
      }
      const uint32_t row = to + (state.lane / 4 + r * 8) * line + state.lane % 4 * 2;
#pragma unroll
      for (int j = part * 16; j < part * 16 + 16; ++j) {
        const float* const x = state.out + j * 4 + r * 2;
        const uint32_t both = pack_bfloat16(x[0], x[1]);
        store_shared(row + j * 8, pack_codes(low_of(both) * inverse, high_of(both) * inverse));
      }
    }
  }
}

// Writes the results of a warpgroup: half of the channels of 64 heads.
//
// Rows go through shared memory, so that whole lines are written.
template <int kGroup>
__device__ __forceinline__ void store_heads(const Keys& keys, int first_head,
                                            State<kGroup>& state) {
  // another 16 bytes put neighbours into different banks
  constexpr uint32_t kLine = 512 + 16, kCodeLine = 256 + 16;
  const Job& job = keys.job;
  const uint32_t rows = state.base + kTiles + (kGroup * 4 + state.warp) * (16 * kLine);
  if (job.out == nullptr) {
    quantize(keys, first_head, state, rows, kCodeLine);
  } else {
    const uint32_t to = rows + state.lane % 16 * kLine + state.lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = pack_bfloat16(state.out[k * 8 + i * 2], state.out[k * 8 + i * 2 + 1]);
      }
      store_matrices(to + k * 32, pairs);
    }
  }
  publish_to_async();
  __syncwarp();
  const int head = first_head + state.warp * 16 + state.lane;
  if (state.lane < 16 && head < job.num_heads) {
    const int64_t at = (keys.token * job.num_heads + head) * kRank + kGroup * 256;
    if (job.out == nullptr) {
      store_bulk(static_cast<uint8_t*>(job.codes) + at, rows + state.lane * kCodeLine, 256);
    } else {
      store_bulk(static_cast<uint16_t*>(job.out) + at, rows + state.lane * kLine, 512);
    }
    wait_for_bulk_stores();
  }
}

template <int kGroup>
__device__ __forceinline__ void compute(const Keys& keys, int first_head, uint32_t base, int warp,
                                        int lane) {
  State<kGroup> state(base, warp, lane);
  run(state, keys.tiles());
  // waits for all reads of tiles
  add_totals(state);
  finish_heads(keys, first_head, state);
  store_heads(keys, first_head, state);
}

#endif

template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1) attend(const __grid_constant__ Job job, int groups) {
#if defined(FD_DSA_HOPPER)
  const uint32_t base = shared_address(shared_memory());
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int half = 0; half < 2; ++half) {
        barrier_init(is_free(base, buffer, half), 4 * kWarpArrivals);
        barrier_init(is_full(base, buffer, half), arrivals(kFp8, half));
      }
    }
    barriers_ready();
  }
  __syncthreads();
  const Keys keys(job, blockIdx.x / groups);
  if (warpgroup < 2) {
    more_registers<Registers<kFp8>::kComputeRegisters>();
    const int first_head = blockIdx.x % groups * kHeads;
    store_queries(keys, first_head, base, threadIdx.x / 32, lane);
    named_barrier(kStart, 256);
    if (warpgroup == 0) {
      compute<0>(keys, first_head, base, warp, lane);
    } else {
      compute<1>(keys, first_head, base, warp, lane);
    }
  } else {
    fewer_registers<Registers<kFp8>::kCopyRegisters>();
    if constexpr (kFp8) {
      Records{keys, base, warp, lane, {}, {}, {}}.run();
    } else {
      copy_keys(keys, base, warp, lane);
    }
  }
#endif
}

// Static, so that two libraries in one process have their own flags.
template <bool kFp8>
static int launch_form(const Job& job, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  const cudaError_t error = sparse_mla::prepare(attend<kFp8>, kBytes, prepared);
  if (error != cudaSuccess) return static_cast<int>(error);
  const int groups = groups_of(job);
  return launch(launch_config(static_cast<unsigned>(job.num_tokens) * groups, kThreads, stream,
                              kBytes),
                attend<kFp8>, job, groups);
}

inline int launch_heads(const Job& job, void* stream) {
  if (job.num_tokens <= 0 || job.num_heads <= 0) return 0;
  return job.is_fp8 != 0 ? launch_form<true>(job, stream) : launch_form<false>(job, stream);
}

}  // namespace fd_dsa::v4

extern "C" int fd_dsa_v4_attend_cuda(const FdDsaV4Attend* job, void* stream) {
  return fd_dsa::v4::launch_heads(*job, stream);
}

extern "C" int fd_dsa_v4_attend_bytes() { return static_cast<int>(sizeof(FdDsaV4Attend)); }
