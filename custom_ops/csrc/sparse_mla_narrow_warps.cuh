// Sparse MLA for 1 to 8 heads, with one or two warpgroups.
//
// Each of the four warps of a warpgroup has 128 latents of every key, for both GEMMs. The warps
// exchange partial scores and weights.
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

// ---- sums of a tile

// Rescales the sums of latents to the new row maximum and to the unit of the largest scale so far.
__device__ __forceinline__ void rescale_out(State& state, uint32_t scale_top, uint32_t rescales,
                                            int lane) {
  const uint32_t exponent = max(state.exponent, scale_top >> 23);
  // 2 to the old exponent minus the new one
  const int32_t down = 127 + static_cast<int32_t>(state.exponent) - static_cast<int32_t>(exponent);
  const float exponent_rescale = __uint_as_float(static_cast<uint32_t>(max(down, 0)) << 23);
  state.exponent = exponent;
  float2 rescale = load_shared_float2(rescales + 2 * (lane & 3) * 4);
  rescale = make_float2(rescale.x * exponent_rescale, rescale.y * exponent_rescale);
  if (__all_sync(~0u, rescale.y == 1.0f && rescale.x == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) state.out[i][k] *= (k & 1) != 0 ? rescale.y : rescale.x;
  }
}

// Adds this warp's latents of 16 keys times their weights.
__device__ __forceinline__ void add_latents(State& state, uint32_t tile, uint32_t weights,
                                            int step, float unit, int warp, int lane) {
  const int g = lane / 4, t = lane & 3;
  const uint32_t rows = tile + (2 * t + step * 16) * kRecord;
  // 16 latents of each of the keys 2t, 2t + 8, 2t + 1 and 2t + 9
  uint4 codes[4];
  float scale[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t row = rows + ((k >> 1) + (k & 1) * 8) * kRecord;
    codes[k] = load_shared_uint4(row + warp * 128 + g * 16);
    scale[k] = __uint_as_float(load_shared(row + kScalesAt + warp * 4)) * unit;
  }
  const float4 x = load_shared_float4(weights + (g * kWeightStride + step * 16 + 4 * t) * 4);
  const uint32_t b[2] = {pack_half(x.x * scale[0], x.y * scale[1]),
                         pack_half(x.z * scale[2], x.w * scale[3])};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) word[k] = reinterpret_cast<const uint32_t*>(&codes[k])[i];
    // latents 4i, 4i + 1 and 4i + 2, 4i + 3 of both keys of a pair
    const uint32_t low[2] = {__byte_perm(word[0], word[1], 0x5140),
                             __byte_perm(word[2], word[3], 0x5140)};
    const uint32_t high[2] = {__byte_perm(word[0], word[1], 0x7362),
                              __byte_perm(word[2], word[3], 0x7362)};
    const uint32_t first[4] = {values_of_codes<false>(low[0]), values_of_codes<true>(low[0]),
                               values_of_codes<false>(low[1]), values_of_codes<true>(low[1])};
    const uint32_t last[4] = {values_of_codes<false>(high[0]), values_of_codes<true>(high[0]),
                              values_of_codes<false>(high[1]), values_of_codes<true>(high[1])};
    multiply_add<false>(state.out[2 * i], first, b);
    multiply_add<false>(state.out[2 * i + 1], last, b);
  }
}

// Attends to all tiles of one warpgroup.
template <int kGroups>
__device__ __forceinline__ void attend_tiles(State& state, const Queries& queries, uint32_t base,
                                             Tiles tiles, int group, int warp, int lane) {
  using Shape = Layout<kGroups>;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) state.out[i][k] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kSoftmaxHeads; ++i) {
    state.top[i] = -INFINITY;
    state.total[i] = 0.0f;
  }
  state.exponent = 1;
  const uint32_t sums = base + Shape::kSums + group * Shape::kSumBytes;
  const uint32_t weights = base + Shape::kWeights + group * Shape::kWeightBytes;
  const uint32_t rescales = base + Shape::kRescaleOffset + group * (kHeads * 4);
  const int32_t turn = kGroups > 1 ? group : 0;
  uint32_t stage = turn, parity = 0;
  for (int32_t at = tiles.first + turn * tiles.step; at < tiles.end; at += kGroups * tiles.step) {
    const uint32_t tile = base + Shape::kRing + stage * kTileBytes;
    barrier_wait(Shape::full(base, stage), parity);
    const uint32_t masks = base + Shape::kMasks + stage * 8;
    const uint2 mask = make_uint2(load_shared(masks), load_shared(masks + 4));
    if ((mask.x | mask.y) != 0) {
      Scores scores = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) add_scores(scores, queries, tile, i, warp, lane);
      const uint32_t scale_top = store_scores(scores, queries, tile, sums, warp, lane);
      named_barrier(kFirstBarrier + group, 128);
      store_weights(state, mask, sums, weights, rescales, warp, lane);
      named_barrier(kFirstBarrier + group, 128);
      rescale_out(state, scale_top, rescales, lane);
      const float unit = __uint_as_float((254 - min(state.exponent, 253u)) << 23);
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        add_latents(state, tile, weights, i, unit, warp, lane);
      }
    }
    // this warp has all that it needs of the tile in registers
    warp_arrive(Shape::empty(base, stage), lane);
    stage += kGroups;
    if (stage >= Shape::kStages) {
      stage -= Shape::kStages;
      parity ^= 1;
    }
  }
}

// ---- results

// Stores row maximum and sum of each head for all warps of the group and of the cluster.
template <int kGroups>
__device__ __forceinline__ void store_stats(const State& state, uint32_t base, int group, int warp,
                                            int lane) {
#pragma unroll
  for (int i = 0; i < kSoftmaxHeads; ++i) {
    const float total = warp_sum(state.total[i]);
    if (lane == 0) {
      store_shared(base + Layout<kGroups>::kStats + (group * kHeads + warp * kSoftmaxHeads + i) * 8,
                   make_float2(state.top[i], total));
    }
  }
  named_barrier(kFirstBarrier + group, 128);
}

// Calls `put(head, latent, 4 sums)` for all sums of a thread.
template <typename Put>
__device__ __forceinline__ void for_each_sum(const State& state, int warp, int lane, Put put) {
  const float unit = __uint_as_float(min(state.exponent, 253u) << 23);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&x)[4] = state.out[2 * i];
      const float(&y)[4] = state.out[2 * i + 1];
      put(2 * (lane & 3) + k, warp * 128 + lane / 4 * 16 + i * 4,
          make_float4(x[k] * unit, x[k + 2] * unit, y[k] * unit, y[k + 2] * unit));
    }
  }
}

// Writes the result of a warpgroup that has all keys of a token.
__device__ __forceinline__ void store_results(const FdDsaSparseMla& job, int64_t token,
                                              const State& state, uint32_t stats, int warp,
                                              int lane) {
  for_each_sum(state, warp, lane, [&](int head, int latent, float4 x) {
    const int64_t row = token * job.num_heads + head;
    if (head >= job.num_heads) return;
    const float total = load_shared_float2(stats + head * 8).y;
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
    store_out(job, row * kRank + latent,
              make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor));
  });
  const int head = warp * 32 + lane;
  if (head < job.num_heads && job.lse != nullptr) {
    const float2 x = load_shared_float2(stats + head * 8);
    job.lse[token * job.num_heads + head] = lse_of(x.x, x.y);
  }
}

// Stores the sums of a warpgroup for the warps that add them up.
template <int kGroups>
__device__ __forceinline__ void store_partial(const State& state, uint32_t base, int group,
                                              int warp, int lane) {
  using Shape = Layout<kGroups>;
  // all warps have read the ring to its end, before it is overwritten
  if (kGroups > 1) named_barrier(kNextBothBarrier, 256);
  const uint32_t part = base + Shape::kRing + group * Shape::kPartBytes;
  for_each_sum(state, warp, lane, [&](int head, int latent, float4 x) {
    store_shared(part + (head * kPartStride + latent) * 4, x);
  });
}

// Adds up the results of both warpgroups of a block that has all keys of a token.
__device__ __forceinline__ void combine_own(const FdDsaSparseMla& job, int64_t token,
                                            uint32_t base) {
  using Shape = Layout<2>;
  const uint32_t work = static_cast<uint32_t>(job.num_heads) * (kRank / 4);
#pragma unroll 2
  for (uint32_t i = threadIdx.x; i < work; i += 256) {
    const uint32_t head = i / (kRank / 4), column = i % (kRank / 4) * 4;
    const uint32_t at = base + Shape::kRing + (head * kPartStride + column) * 4;
    const float2 a = load_shared_float2(base + Shape::kStats + head * 8);
    const float2 b = load_shared_float2(base + Shape::kStats + (kHeads + head) * 8);
    const float4 x = load_shared_float4(at), y = load_shared_float4(at + Shape::kPartBytes);
    const float top = fmaxf(a.x, b.x), from = top == -INFINITY ? 0.0f : top;
    float mine = exp2_of(a.x - from), other = exp2_of(b.x - from);
    const float total = fmaf(b.y, other, a.y * mine);
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
    const int64_t row = token * job.num_heads + head;
    if (column == 0 && job.lse != nullptr) job.lse[row] = lse_of(top, total);
    mine *= factor, other *= factor;
    store_out(job, row * kRank + column,
              make_float4(fmaf(y.x, other, x.x * mine), fmaf(y.y, other, x.y * mine),
                          fmaf(y.z, other, x.z * mine), fmaf(y.w, other, x.w * mine)));
  }
}

#endif  // FD_DSA_HOPPER

// Attends with a cluster of blocks for each token.
template <int kGroups>
__global__ void __launch_bounds__(Layout<kGroups>::kThreads,
                                  Layout<kGroups>::kBlocksPerSm)
    kernel(const __grid_constant__ FdDsaSparseMla job) {
#if defined(FD_DSA_HOPPER)
  using Shape = Layout<kGroups>;
  const Place place = begin<Shape>(job);
  if (place.warp >= 4 * kGroups) {
    copy_and_wait<Shape>(job, place, 4 * kGroups);
    return;
  }
  more_registers<Shape::kComputeRegisters>();
  const auto [base, blocks, rank, warp, lane, token, tiles] = place;
  const bool is_alone = blocks == 1;
  const int group = warp / 4, member = warp % 4;
  Queries queries;
  State state;
  load_queries(job, token, queries, state, base + Shape::kSums + group * Shape::kSumBytes, group,
               member, lane);
  attend_tiles<kGroups>(state, queries, base, tiles, group, member, lane);
  store_stats<kGroups>(state, base, group, member, lane);
  if (kGroups == 1 && is_alone) {
    store_results(job, token, state, base + Shape::kStats + group * (kHeads * 8), member, lane);
    return;
  }
  store_partial<kGroups>(state, base, group, member, lane);
  if (is_alone) {
    exchange_barrier();
    combine_own(job, token, base);
    return;
  }
  combine<Shape>(job, token, base, rank, blocks);
#endif
}

}  // namespace fd_dsa::narrow::warps
