// Sparse MLA for 9 to 32 heads: the weights of a tile, and sums of earlier tiles.
#pragma once

#include "sparse_mla_narrow_warpgroups_scores.cuh"

namespace fd_dsa::narrow::warpgroups {

#if defined(FD_DSA_HOPPER)

// A lane's two keys: scales of each 128 latents times their unit, and scores of heads.
template <int kHeads>
struct Keys {
  float first[4], second[4];
  float2 score[kHeads / 4];
};

// Factors of the sums before more is added: one per head of this warp, and one per 128 latents.
template <int kHeads>
struct Rescales {
  float head_rescale[kHeads / 4], unit_rescale[4];
};

// A larger score updates the row maximum only if it is larger by more than this power of two.
// Weights times scales then stay below 2^10, which float16 holds as well as values below 1.
constexpr float kSlack = 8.0f;

// Updates the row maxima of all heads of the warp and the units, which is rare after the first
// tile.
template <int kHeads>
__device__ __forceinline__ void update_row_maxima(Sums<kHeads>& state, Keys<kHeads>& keys,
                                                  float (&top)[kHeads / 4],
                                                  Rescales<kHeads>& rescales) {
#pragma unroll
  for (int i = 0; i < kHeads / 4; ++i) {
    const float2 s = keys.score[i];
    const float now = fmaxf(top[i], warp_max(fmaxf(s.x, s.y)));
    rescales.head_rescale[i] = exp2_of(top[i] - (now == -INFINITY ? 0.0f : now));
    top[i] = now;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t largest = __reduce_max_sync(
        ~0u, max(__float_as_uint(keys.first[i]) & 0x7fffffffu,
                 __float_as_uint(keys.second[i]) & 0x7fffffffu));
    // From the largest value so far. The two last exponents stand for numbers below 8, and for inf
    // and NaN.
    const uint32_t before = 254 - (__float_as_uint(state.unit[i]) >> 23);
    const uint32_t after = min(max(before, largest >> 23), 253u);
    state.unit[i] = __uint_as_float((254 - after) << 23);
    rescales.unit_rescale[i] =
        __uint_as_float(after - before < 127 ? (127 + before - after) << 23 : 0);
  }
}

// Turns the scores of some heads over all 64 keys into weights for each 128 latents.
//
// A lane has two neighbouring keys.
template <int kHeads>
__device__ __forceinline__ void store_weights(Sums<kHeads>& state, Rescales<kHeads>& rescales,
                                              uint32_t tile, uint2 mask, uint32_t base, int group,
                                              int warp, int lane) {
  using Shape = Layout<kHeads>;
  constexpr int kSoftmaxHeads = kHeads / 4;
  const uint32_t bits = (lane < 16 ? mask.x : mask.y) >> 2 * (lane & 15);
  const uint32_t at = (group * kHeads + warp * kSoftmaxHeads) * 4,
                 tops = base + Shape::kRowMaxOffset + at;
  const uint32_t sums = base + Shape::kSums + group * Shape::kSumBytes;
  const float4 first = load_shared_float4(tile + 2 * lane * kRecord + kScalesAt);
  const float4 second = load_shared_float4(tile + (2 * lane + 1) * kRecord + kScalesAt);
  Keys<kHeads> keys;
  float top[kSoftmaxHeads];
  bool max_changes = false;
#pragma unroll
  for (int i = 0; i < kSoftmaxHeads; i += 4) {
    const float4 factor =
        load_shared_float4(base + Shape::kFactors + (warp * kSoftmaxHeads + i) * 4);
    const float4 before = load_shared_float4(tops + i * 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int head = warp * kSoftmaxHeads + i + k;
      float2 s = load_shared_float2(sums + (head * kSumStride + 2 * lane) * 4);
      s.x = (bits & 1) != 0 ? s.x * part_of(factor, k) : -INFINITY;
      s.y = (bits & 2) != 0 ? s.y * part_of(factor, k) : -INFINITY;
      top[i + k] = part_of(before, k);
      keys.score[i + k] = s;
      max_changes = max_changes || fmaxf(s.x, s.y) > top[i + k] + kSlack;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keys.first[i] = part_of(first, i) * state.unit[i];
    keys.second[i] = part_of(second, i) * state.unit[i];
    max_changes = max_changes || fmaxf(fabsf(keys.first[i]), fabsf(keys.second[i])) >= 2.0f;
    rescales.unit_rescale[i] = 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kSoftmaxHeads; ++i) rescales.head_rescale[i] = 1.0f;
  const bool any = __any_sync(~0u, max_changes);
  if (any) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keys.first[i] = part_of(first, i);
      keys.second[i] = part_of(second, i);
    }
    update_row_maxima(state, keys, top, rescales);
    // all lanes have read the row maxima before they are overwritten
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keys.first[i] *= state.unit[i];
      keys.second[i] *= state.unit[i];
    }
#pragma unroll
    for (int i = 0; i < kSoftmaxHeads; ++i) state.total[i] *= rescales.head_rescale[i];
  }
  const uint32_t weights = base + Shape::kWeights + group * Shape::kWeightBytes + lane % 4 * 4;
#pragma unroll
  for (int i = 0; i < kSoftmaxHeads; ++i) {
    // before the first key the maximum is -inf, and -inf - -inf would be NaN
    const float from = top[i] == -INFINITY ? 0.0f : top[i];
    const float2 s = make_float2(exp2_of(keys.score[i].x - from), exp2_of(keys.score[i].y - from));
    state.total[i] += s.x + s.y;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_shared(weights + k * Shape::kOperand + swizzled(warp * kSoftmaxHeads + i, lane / 4),
                   pack_half(s.x * keys.first[k], s.y * keys.second[k]));
    }
  }
  if (lane == 0) {
    const float (&x)[kSoftmaxHeads] = rescales.head_rescale;
#pragma unroll
    for (int i = 0; i < kSoftmaxHeads; i += 4) {
      store_shared(base + Shape::kRescaleOffset + at + i * 4,
                   make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
      if (any) store_shared(tops + i * 4, make_float4(top[i], top[i + 1], top[i + 2], top[i + 3]));
    }
    store_shared(base + Shape::kMaxChangedOffset + (group * 4 + warp) * 4, any ? 1u : 0u);
  }
  publish_to_async();
}

// Rescales the sums to the new row maxima and units.
template <int kHeads>
__device__ __forceinline__ void rescale_sums(Sums<kHeads>& state, const float (&unit_rescale)[4],
                                             uint32_t base, int group, int lane) {
  using Shape = Layout<kHeads>;
  const uint4 max_changed = load_shared_uint4(base + Shape::kMaxChangedOffset + group * 16);
  if ((max_changed.x | max_changed.y | max_changed.z | max_changed.w) == 0) return;
#pragma unroll
  for (int j = 0; j < kHeads / 8; ++j) {
    const float2 x = load_shared_float2(base + Shape::kRescaleOffset +
                                        (group * kHeads + 8 * j + 2 * (lane & 3)) * 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        state.out[i][4 * j + k] *= ((k & 1) != 0 ? x.y : x.x) * unit_rescale[i / 2];
      }
    }
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow::warpgroups
