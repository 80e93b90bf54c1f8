// Sparse MLA for 1 to 8 heads: shared memory, queries, and the scores and weights of a tile.
#pragma once

#include "sparse_mla_narrow.cuh"

namespace fd_dsa::narrow::warps {

// heads of a token, and heads whose softmax one warp computes
constexpr int kHeads = 8, kSoftmaxHeads = kHeads / 4;

// Offsets in shared memory, in bytes. Either one warpgroup computes, with two blocks per
// multiprocessor, or two warpgroups take the tiles in turn.
template <int kWarpgroups>
struct Layout {
  static constexpr int kHeads = warps::kHeads, kGroups = kWarpgroups;
  static constexpr int kStages = 2 * kGroups;
  // warpgroups whose results are added up
  static constexpr int kParts = kGroups;
  static constexpr int kRing = 0;
  static constexpr int kSums = kRing + kStages * kTileBytes;
  static constexpr int kSumBytes = 4 * kHeads * kSumStride * 4;
  static constexpr int kWeights = kSums + kGroups * kSumBytes;
  static constexpr int kWeightBytes = kHeads * kWeightStride * 4;
  static constexpr int kRescaleOffset = kWeights + kGroups * kWeightBytes;
  static constexpr int kStats = kRescaleOffset + kGroups * kHeads * 4;
  static constexpr int kMasks = kStats + kGroups * kHeads * 8;
  static constexpr int kBarriers = kMasks + kStages * 8;
  static constexpr int kBytes = kBarriers + kStages * 16;
  static constexpr int kThreads = (kGroups * 4 + kCopyWarps) * 32;
  static constexpr int kBlocksPerSm = kGroups == 1 ? 2 : 1;
  // registers of a computing thread and of a copying thread
  static constexpr int kComputeRegisters = kGroups == 1 ? 216 : 232, kCopyRegisters = 40;
  static constexpr int kPartBytes = kStages / kGroups * kTileBytes;
  static_assert(kHeads * kPartStride * 4 <= kPartBytes);

  // a stage always belongs to the same warpgroup, and one barrier counts its tiles
  static constexpr int kFulls = 1;
  static __device__ __forceinline__ uint32_t full(uint32_t base, uint32_t stage, int = 0) {
    return base + kBarriers + stage * 16;
  }
  static __device__ __forceinline__ uint32_t empty(uint32_t base, uint32_t stage) {
    return full(base, stage) + 8;
  }
};

#if defined(FD_DSA_HOPPER)

// The queries of a warp, which has 128 latents and 16 roped values of every key.
//
// Thread (g, t) is lane 4g + t. In GEMMs it has head g, or heads 2t and 2t + 1.
struct Queries {
  // float16, [step of 16 latents]: latents 4t to 4t + 3
  uint32_t latents[8][2];
  uint32_t roped[2];
};

struct State {
  // [2i], [2i + 1]: latents 16g + 4i and the next, and the next two
  float out[8][4];
  // of the heads whose softmax this warp computes; `total` is a partial sum of the lane
  float top[kSoftmaxHeads], total[kSoftmaxHeads], factor[kSoftmaxHeads];
  // biased exponent of the largest scale so far, which is the unit of the weights
  uint32_t exponent;
};

// ---- queries

// Loads queries and scales those of each head into the range of float16 by a power of two.
//
// `tops` uses the memory of the sums.
__device__ __forceinline__ void load_queries(const FdDsaSparseMla& job, int64_t token,
                                             Queries& queries, State& state, uint32_t tops,
                                             int group, int warp, int lane) {
  const int t = lane % 4, head = lane / 4;
  const bool is_head = head < job.num_heads;
  const __nv_bfloat16* row = static_cast<const __nv_bfloat16*>(job.q) +
                             (token * job.num_heads + (is_head ? head : 0)) * kWidth;
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint2 x = __ldcs(reinterpret_cast<const uint2*>(row + warp * 128 + i * 16 + t * 4));
    queries.latents[i][0] = is_head ? x.x : 0;
    queries.latents[i][1] = is_head ? x.y : 0;
    top = max(top, max(largest_magnitude(queries.latents[i][0]),
                       largest_magnitude(queries.latents[i][1])));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t x =
        __ldcs(reinterpret_cast<const uint32_t*>(row + kRank + warp * 16 + i * 8 + t * 2));
    queries.roped[i] = is_head ? x : 0;
  }
  top = max(top, __shfl_xor_sync(~0u, top, 1));
  top = max(top, __shfl_xor_sync(~0u, top, 2));
  if (t == 0) store_shared(tops + (warp * kHeads + lane / 4) * 4, top);
  named_barrier(kFirstBarrier + group, 128);
  auto exponent_of = [&](int head) {
    uint32_t top = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) top = max(top, load_shared(tops + (w * kHeads + head) * 4));
    return max(top >> 7, 64u);
  };
  const float up = __uint_as_float((268 - exponent_of(lane / 4)) << 23);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t& x = queries.latents[i][k];
      x = pack_half(low_of(x) * up, high_of(x) * up);
    }
    uint32_t& x = queries.roped[k];
    x = pack_bfloat16(low_of(x) * up, high_of(x) * up);
  }
#pragma unroll
  for (int i = 0; i < kSoftmaxHeads; ++i) {
    const float back = __uint_as_float((exponent_of(warp * kSoftmaxHeads + i) - 14) << 23);
    state.factor[i] = back * job.softmax_scale * 1.4426950408889634f;
  }
  // the memory holds sums of other warps after this barrier
  named_barrier(kFirstBarrier + group, 128);
}

// ---- scores and weights of a tile

// This warp's part of the scores of a tile: [16 keys].
using Scores = float[kSixteens][4];

// Adds scores over 32 of this warp's latents.
__device__ __forceinline__ void add_scores(Scores& scores, const Queries& queries, uint32_t tile,
                                           int step, int warp, int lane) {
  const uint32_t row = tile + (lane & 15) * kRecord + (lane >> 4) * 16 + warp * 128 + step * 32;
  uint32_t words[kSixteens][4];
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) load_matrices(words[m], row + m * 16 * kRecord);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int m = 0; m < kSixteens; ++m) {
      const uint32_t* two = words[m] + 2 * half;
      const uint32_t a[4] = {values_of_codes<false>(two[0]), values_of_codes<false>(two[1]),
                             values_of_codes<true>(two[0]), values_of_codes<true>(two[1])};
      multiply_add<false>(scores[m], a, queries.latents[2 * step + half]);
    }
  }
}

// Scales scores, adds those over this warp's roped values, and stores them for the softmax.
//
// Returns the bits of the largest scale.
__device__ __forceinline__ uint32_t store_scores(Scores& scores, const Queries& queries,
                                                 uint32_t tile, uint32_t sums, int warp, int lane) {
  const uint32_t row = tile + (lane & 15) * kRecord + (lane >> 4) * 16 + kRopeAt + warp * 32;
  const uint32_t scales = tile + lane / 4 * kRecord + kScalesAt + warp * 4;
  uint32_t roped[kSixteens][4], top = 0;
  float scale[kSixteens][2];
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
    load_matrices(roped[m], row + m * 16 * kRecord);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t bits = load_shared(scales + (m * 16 + k * 8) * kRecord);
      scale[m][k] = __uint_as_float(bits);
      top = max(top, bits & 0x7fffffff);
    }
  }
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
#pragma unroll
    for (int k = 0; k < 4; ++k) scores[m][k] *= scale[m][k / 2];
    multiply_add<true>(scores[m], roped[m], queries.roped);
  }
  const uint32_t to = sums + ((warp * kHeads + 2 * (lane & 3)) * kSumStride + lane / 4 * 2) * 4;
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      store_shared(to + (k * kSumStride + m * 16) * 4,
                   make_float2(scores[m][k], scores[m][k + 2]));
    }
  }
  return __reduce_max_sync(~0u, top);
}

// Adds up the scores of some heads over all 64 keys, and turns them into weights.
//
// A lane has two keys, i and i + 8 of 16.
__device__ __forceinline__ void store_weights(State& state, uint2 mask, uint32_t sums,
                                              uint32_t weights, uint32_t rescales, int warp,
                                              int lane) {
  const uint32_t bits = (lane < 16 ? mask.x : mask.y) >> ((lane >> 3 & 1) * 16 + (lane & 7));
  float rescale[kSoftmaxHeads];
#pragma unroll
  for (int i = 0; i < kSoftmaxHeads; ++i) {
    const int head = warp * kSoftmaxHeads + i;
    float2 s = load_shared_float2(sums + (head * kSumStride + 2 * lane) * 4);
#pragma unroll
    for (int w = 1; w < 4; ++w) {
      const float2 x =
          load_shared_float2(sums + ((w * kHeads + head) * kSumStride + 2 * lane) * 4);
      s = make_float2(s.x + x.x, s.y + x.y);
    }
    s.x = (bits & 1) != 0 ? s.x * state.factor[i] : -INFINITY;
    s.y = (bits & 256) != 0 ? s.y * state.factor[i] : -INFINITY;
    const float top = fmaxf(state.top[i], warp_max(fmaxf(s.x, s.y)));
    // before the first key the maximum is -inf, and -inf - -inf would be NaN
    const float from = top == -INFINITY ? 0.0f : top;
    rescale[i] = exp2_of(state.top[i] - from);
    state.top[i] = top;
    s = make_float2(exp2_of(s.x - from), exp2_of(s.y - from));
    state.total[i] = fmaf(state.total[i], rescale[i], s.x + s.y);
    store_shared(weights + (head * kWeightStride + 2 * lane) * 4, s);
  }
  if (lane == 0) {
    store_shared(rescales + warp * kSoftmaxHeads * 4, make_float2(rescale[0], rescale[1]));
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow::warps
