// Attention of DeepSeek-V4 over bfloat16 keys or FP8 records, for blocks of 64 heads.
//
// A block has all keys of a token and 64 of its heads. It works like a block of sparse_mla_wide.cu:
// one warpgroup copies tiles of 64 keys to shared memory, and two compute. Keys differ in two ways
// from latents of MLA. They have no roped values beside them, because the last channels of a key
// are rotated in place. And they come from three tensors: the step's own keys, the ring of the
// row's older keys, and the pool of entries. Records become bfloat16 on their way to shared memory,
// without a loss.
//
// There are as many blocks as multiprocessors, and each goes on with other tokens. The copying
// warpgroup is then up to two tiles ahead, so the first keys of a token come while the results of
// the token before are written.
//
// Queries are multiplied as they are, apart from their rotated channels. Their RMSNorm is a factor
// of the scores.
#include "v4_attend.h"

#include <algorithm>

#include "v4_attend_keys.cuh"

namespace fd_dsa::v4 {

inline int groups_of(const Job& job) { return (job.num_heads + kHeads - 1) / kHeads; }

#if defined(FD_DSA_HOPPER)

// Registers of a computing thread and of a copying one, through which records pass.
constexpr int kComputeRegisters = 200, kCopyRegisters = 104;
static_assert(2 * kComputeRegisters + kCopyRegisters == 3 * 168);

// The angles of a token and the sinks of its heads. Two tokens take turns.
constexpr uint32_t kAngles = kQuery + kRopeBlock, kSinks = kAngles + 4 * kRope;
constexpr uint32_t kNextAngles = 4 * (kRope + kHeads);
static_assert(kAngles + 2 * kNextAngles <= kTiles);

constexpr int kPairs = kRope / 2;  // that are rotated

template <int kGroup>
using State = ComputeWarpgroup<false, kGroup, false>;

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

// The queries of an item, which a thread holds between two items.
struct Queries {
  static constexpr int kWarpHeads = 8;  // of a warp
  static constexpr int kFirstRotated = 32 - kRope / 8;
  uint4 x[kWarpHeads][2];
  float4 cos, sin;
  float sink;

  // Loads half of the channels of a warp's heads, with half 0 also the rest. Nothing is waited for
  // here.
  template <int kHalf>
  __device__ __forceinline__ void load(const Job& job, const Item& item, int position, int warp,
                                       int lane) {
    const int first = item.first_head + warp * kWarpHeads, last = job.num_heads - 1;
    const auto* const token = static_cast<const uint16_t*>(job.q) + item.token * job.q_stride;
#pragma unroll
    for (int i = 0; i < kWarpHeads; ++i) {
      const auto* const row = token + int64_t{min(first + i, last)} * kRank;
      x[i][kHalf] = __ldg(reinterpret_cast<const uint4*>(row) + kHalf * 32 + lane);
    }
    if constexpr (kHalf == 0) {
      const float* const angles = job.cos_sin + int64_t{max(position, 0)} * kRope;
      const int four = max(lane - kFirstRotated, 0);
      cos = __ldg(reinterpret_cast<const float4*>(angles) + four);
      sin = __ldg(reinterpret_cast<const float4*>(angles + kPairs) + four);
      sink = __ldg(job.sinks + min(first + lane % kWarpHeads, last));
    }
  }

  // Writes the queries as an operand, and the factor of each head's scores.
  //
  // The factor holds the RMSNorm, and 512^-0.5.
  //
  // Args:
  //   turn: 0 or kNextAngles.
  __device__ __forceinline__ void store(const Job& job, uint32_t base, uint32_t turn, int warp,
                                        int own_lane) {
    // addresses are made again, because registers for them are needed between two items
    const int lane = unknown(own_lane);
    float sums[kWarpHeads];
#pragma unroll
    for (int i = 0; i < kWarpHeads; ++i) sums[i] = square_sum(x[i][0]) + square_sum(x[i][1]);
    if (lane >= kFirstRotated) {
#pragma unroll
      for (int i = 0; i < kWarpHeads; ++i) x[i][1] = rotated(x[i][1], cos, sin);
    }
#pragma unroll
    for (int i = 0; i < kWarpHeads; ++i) {
      const int row = warp * kWarpHeads + i;
      const uint32_t to = base + kQuery + lane / 8 * kBlock + swizzled(row, lane % 8);
      store_shared(to, x[i][0]);
      store_shared(to + 4 * kBlock, x[i][1]);
    }
    const float sum = sum_of_own_head(sums, lane);
    if (lane % 4 == 0) {
      const int row = warp * kWarpHeads + lane / 4;
      store_shared(base + kFactors + row * 4, kLog2E / sqrtf(sum + kRank * job.epsilon));
    }
    if (lane < kWarpHeads) {
      store_shared(base + turn + kSinks + (warp * kWarpHeads + lane) * 4, sink);
    }
    if (warp == 0 && lane >= kFirstRotated) {
      const uint32_t to = base + turn + kAngles + (lane - kFirstRotated) * 16;
      store_shared(to, cos);
      store_shared(to + 4 * kPairs, sin);
    }
    publish_to_async();
  }

  // Returns the sum over all lanes of value `lane / 4`.
  //
  // Lanes exchange the values that they do not keep, so that there are fewer and fewer.
  static __device__ __forceinline__ float sum_of_own_head(float (&values)[kWarpHeads], int lane) {
#pragma unroll
    for (int count = kWarpHeads / 2; count > 0; count /= 2) {
      const bool keeps_upper = (lane & count * 4) != 0;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float given = keeps_upper ? values[i] : values[i + count];
        const float kept = keeps_upper ? values[i + count] : values[i];
        values[i] = kept + __shfl_xor_sync(~0u, given, count * 4);
      }
    }
    const float sum = values[0] + __shfl_xor_sync(~0u, values[0], 2);
    return sum + __shfl_xor_sync(~0u, sum, 1);
  }
};

// The results of a warpgroup in bfloat16, half of the channels of 64 heads. They go from registers to
// memory in whole sectors of 32 bytes.
//
// A thread has two neighbouring channels of each 8, of rows r = 0 and 1.
template <int kGroup>
struct Results {
  uint32_t pairs[2][32];
  float inverse[4];  // of the scales of row r and channels from 128 p on: number 2 p + r
  int row, lane;

  // Divides the sums by their weights and the sink's, and reverts the rotation of the keys.
  __device__ __forceinline__ Results(State<kGroup>& state, uint32_t turn)
      : row(state.row(0)), lane(unknown(state.lane)) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sink = load_shared_float(state.base + turn + kSinks + (row + r * 8) * 4);
      const float share = exp2_of(sink * kLog2E - state.top[r]);
      // padding has no keys
      factor[r] = state.top[r] == -INFINITY ? 0.0f : 1.0f / (state.total[r] + share);
    }
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      float cos = 1, sin = 0;
      if (kGroup == 1 && j >= 24) {
        const uint32_t pair = state.base + turn + kAngles + ((j - 24) * 4 + lane % 4) * 4;
        cos = load_shared_float(pair), sin = load_shared_float(pair + 4 * kPairs);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = state.out[j * 4 + r * 2] * factor[r];
        const float y = state.out[j * 4 + r * 2 + 1] * factor[r];
        pairs[r][j] = kGroup == 1 && j >= 24 ? pack_bfloat16(x * cos + y * sin, y * cos - x * sin)
                                             : pack_bfloat16(x, y);
      }
    }
  }

  // Gives each of four lanes the word of the same number of all, in the order of the lanes.
  __device__ __forceinline__ uint4 exchanged(uint4 x) const {
    const bool is_high = (lane & 2) != 0, is_odd = (lane & 1) != 0;
    const uint32_t first = __shfl_xor_sync(~0u, is_high ? x.x : x.z, 2);
    const uint32_t second = __shfl_xor_sync(~0u, is_high ? x.y : x.w, 2);
    // words of an even and of an odd number, of the lower lane and of that two further on
    const uint32_t even[2] = {is_high ? first : x.x, is_high ? x.z : first};
    const uint32_t odd[2] = {is_high ? second : x.y, is_high ? x.w : second};
    const uint32_t third = __shfl_xor_sync(~0u, is_odd ? even[0] : odd[0], 1);
    const uint32_t fourth = __shfl_xor_sync(~0u, is_odd ? even[1] : odd[1], 1);
    return {is_odd ? third : even[0], is_odd ? odd[0] : third, is_odd ? fourth : even[1],
            is_odd ? odd[1] : fourth};
  }

  // Does the same with the four halves of two words.
  __device__ __forceinline__ uint2 exchanged(uint2 x) const {
    const bool is_high = (lane & 2) != 0, is_odd = (lane & 1) != 0;
    const uint32_t other = __shfl_xor_sync(~0u, is_high ? x.x : x.y, 2);
    const uint32_t lower = is_high ? other : x.x, upper = is_high ? x.y : other;
    const uint32_t even = __byte_perm(lower, upper, 0x5410);
    const uint32_t odd = __byte_perm(lower, upper, 0x7632);
    const uint32_t found = __shfl_xor_sync(~0u, is_odd ? even : odd, 1);
    const uint32_t left = is_odd ? found : even, right = is_odd ? odd : found;
    return {__byte_perm(left, right, 0x5410), __byte_perm(left, right, 0x7632)};
  }

  // Stores row r.
  __device__ __forceinline__ void store(const Job& job, const Item& item, int r) const {
    const int head = item.first_head + row + r * 8;
    const int64_t at = (item.token * job.num_heads + head) * kRank + kGroup * 256 + lane % 4 * 8;
    const bool is_head = head < job.num_heads;
    if (job.out == nullptr) store_codes(static_cast<uint8_t*>(job.codes) + at, is_head, r);
    else store_values(static_cast<uint16_t*>(job.out) + at, is_head, r);
  }

  __device__ __forceinline__ void store_values(uint16_t* to, bool is_head, int r) const {
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
      const uint32_t* const own = pairs[r] + j;
      const uint4 x = exchanged(uint4{own[0], own[1], own[2], own[3]});
      if (is_head) *reinterpret_cast<uint4*>(to + j * 8) = x;
    }
  }

  __device__ __forceinline__ void store_codes(uint8_t* to, bool is_head, int r) const {
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
      uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t both = pairs[r][j + i];
        const float factor = inverse[j / 16 * 2 + r];
        codes[i] = pack_codes(low_of(both) * factor, high_of(both) * factor);
      }
      const uint2 x = exchanged(uint2{codes[0] | codes[1] << 16, codes[2] | codes[3] << 16});
      if (is_head) *reinterpret_cast<uint2*>(to + j * 8) = x;
    }
  }

  // Stores the scales of 128 channels each, from the bfloat16 values.
  __device__ __forceinline__ void store_scales(const Job& job, const Item& item) {
    float scales[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t top = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        top = __vmaxu2(top, pairs[i % 2][i / 2 * 16 + j] & 0x7fff7fffu);
      }
      top = __vmaxu2(top, __shfl_xor_sync(~0u, top, 1));
      top = __vmaxu2(top, __shfl_xor_sync(~0u, top, 2));
      scales[i] = scale_of(fmaxf(low_of(top), high_of(top)), true);
      // the inverse of a power of two is exact
      inverse[i] = inverse_of_power(scales[i]);
    }
    // each of four lanes has all four scales, and stores one
    const int mine = lane % 4, head = item.first_head + row + mine % 2 * 8;
    const float scale = mine < 2 ? (mine == 0 ? scales[0] : scales[1])
                                 : (mine == 2 ? scales[2] : scales[3]);
    const int64_t group = head * 4 + kGroup * 2 + mine / 2;
    if (head < job.num_heads) job.scales[group * job.scale_stride + item.token] = scale;
  }
};

// Attends to the keys of one item after another.
//
// The queries of the next item are loaded while results are written.
template <int kGroup>
__device__ __forceinline__ void compute(const Job& job, int groups, uint32_t base, int warp,
                                        int lane) {
  const int warp_of_both = kGroup * 4 + warp, last = job.num_tokens * groups - 1;
  int number = blockIdx.x, uses = 0;
  uint32_t turn = 0;
  int row = __ldg(job.rows + number / groups), position = __ldg(job.positions + number / groups);
  Queries queries;
  const Item first(number, groups);
  queries.load<0>(job, first, position, warp_of_both, lane);
  queries.load<1>(job, first, position, warp_of_both, lane);
  for (;;) {
    const int tiles = Visible(job, row, position).tiles();
    const Item item(number, groups);
    queries.store(job, base, turn, warp_of_both, lane);
    named_barrier(kStart, 256);
    State<kGroup> state(base, warp, lane);
    run(state, tiles, uses);
    uses += (tiles + 1 - kGroup) / 2;
    // waits for all reads of tiles and queries
    add_totals(state);
    Results<kGroup> results(state, turn);
    number += static_cast<int>(gridDim.x), turn ^= kNextAngles;
    // The last item is loaded again, because a branch would wait for the loads. The L1 cache has row
    // and position, which the copying warpgroup has loaded.
    const Item next(min(number, last), groups);
    row = __ldg(job.rows + next.token), position = __ldg(job.positions + next.token);
    if (job.out == nullptr) results.store_scales(job, item);
    results.store(job, item, 0);
    queries.load<0>(job, next, position, warp_of_both, lane);
    results.store(job, item, 1);
    queries.load<1>(job, next, position, warp_of_both, lane);
    if (number > last) break;
  }
}

#endif

__global__ void __launch_bounds__(kThreads, 1) attend(const __grid_constant__ Job job, int groups) {
#if defined(FD_DSA_HOPPER)
  const uint32_t base = shared_address(shared_memory());
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int half = 0; half < 2; ++half) {
        barrier_init(is_free(base, buffer, half), 4 * kWarpArrivals);
        // stores of warps and copies of threads, of which one kind may be missing
        barrier_init(is_full(base, buffer, half), 4 * kWarpArrivals + 128);
      }
    }
    barriers_ready();
  }
  wait_for_inputs();
  start_next();
  __syncthreads();
  if (warpgroup < 2) {
    more_registers<kComputeRegisters>();
    if (warpgroup == 0) compute<0>(job, groups, base, warp, lane);
    else compute<1>(job, groups, base, warp, lane);
  } else {
    fewer_registers<kCopyRegisters>();
    if (job.is_fp8 != 0) Copier<true>{job, base, warp, lane, {}, {}, {}, {}, {}}.run(groups);
    else Copier<false>{job, base, warp, lane, {}, {}, {}, {}, {}}.run(groups);
  }
#endif
}

inline bool is_supported(const Job& job) {
  const int key_bytes = job.is_fp8 != 0 ? 8 : 16;
  const int num_plain = (job.plain_keys != nullptr) + (job.plain_ring != nullptr) +
                        (job.plain_pool != nullptr) + (job.is_plain != nullptr);
  const bool has_result =
      job.out != nullptr ||
      (job.codes != nullptr && job.scales != nullptr && job.scale_stride >= job.num_tokens);
  // the ring has the keys of a window before the token's own
  return has_result && job.window > 0 && job.ring_rows >= job.window - 1 &&
         (job.pool == nullptr || (job.ratio > 0 && job.per_block > 0)) &&
         (num_plain == 0 || num_plain == 4) && job.q_stride % 8 == 0 && is_aligned(job.q) &&
         is_aligned(job.keys, key_bytes) && is_aligned(job.ring, key_bytes) &&
         is_aligned(job.pool, key_bytes) && is_aligned(job.plain_keys) &&
         is_aligned(job.plain_ring) && is_aligned(job.plain_pool) && is_aligned(job.cos_sin) &&
         is_aligned(job.out) && is_aligned(job.codes);
}

// Static, so that two libraries in one process have their own flags.
static int launch_heads(const Job& job, void* stream) {
  if (job.num_tokens <= 0 || job.num_heads <= 0) return 0;
  if (!is_supported(job)) return static_cast<int>(cudaErrorInvalidValue);
  static std::atomic<uint64_t> prepared{0};
  Gpu gpu = {};
  const cudaError_t error = prepare_on_hopper(attend, kBytes, false, prepared, gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  const int groups = groups_of(job);
  const int64_t items = static_cast<int64_t>(job.num_tokens) * groups;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(gpu.num_sms, items));
  cudaLaunchConfig_t config = launch_config(blocks, kThreads, stream, kBytes);
  LaunchAttributes attributes;
  if (job.starts_early != 0) start_early(config, attributes);
  return launch(config, attend, job, groups);
}

}  // namespace fd_dsa::v4

extern "C" int fd_dsa_v4_attend_cuda(const FdDsaV4Attend* job, void* stream) {
  return fd_dsa::v4::launch_heads(*job, stream);
}

extern "C" int fd_dsa_v4_attend_bytes() { return static_cast<int>(sizeof(FdDsaV4Attend)); }
