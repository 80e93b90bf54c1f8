// Sparse MLA for 1 to 8 heads, with one or two warpgroups.
//
// Each of the four warps of a warpgroup has 128 latents of every key, for both GEMMs. The warps
// exchange partial scores and weights.
#pragma once

#include "sparse_mla_narrow_warps_scores.cuh"

namespace fd_dsa::narrow::warps {

#if defined(FD_DSA_HOPPER)

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
