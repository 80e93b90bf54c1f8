// Sparse MLA for 9 to 32 heads: the softmax of a tile between two products of a warpgroup.
#ifndef FD_DSA_SPARSE_MLA_NARROW_WEIGHTS_CUH
#define FD_DSA_SPARSE_MLA_NARROW_WEIGHTS_CUH

#include "sparse_mla_narrow_products.cuh"

namespace fd_dsa::narrow {

#if defined(FD_DSA_HOPPER)

// What a lane has of two keys: scales of each 128 latents times their unit, and scores of heads.
template <int kHeads>
struct Keys {
  float first[4], second[4];
  float2 score[kHeads / 4];
};

// What is to be done with sums before more is added: by heads of this warp, and by 128 latents.
template <int kHeads>
struct Shrinks {
  float of_head[kHeads / 4], of_unit[4];
};

// A larger score moves the base of the exponentials if it is so much larger, in powers of two:
// weights times scales stay below 2^10, which float16 holds as well as those below 1.
constexpr float kSlack = 8.0f;

// New bases for all heads of the warp, and new units; rarely after the first tile.
template <int kHeads>
__device__ __forceinline__ void move_bases(Sums<kHeads>& my, Keys<kHeads>& keys,
                                           float (&top)[kHeads / 4], Shrinks<kHeads>& shrinks) {
#pragma unroll
  for (int i = 0; i < kHeads / 4; ++i) {
    const float2 s = keys.score[i];
    const float now = fmaxf(top[i], largest_of_warp(fmaxf(s.x, s.y)));
    shrinks.of_head[i] = exp2_of(top[i] - (now == -INFINITY ? 0.0f : now));
    top[i] = now;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t largest = __reduce_max_sync(
        ~0u, max(__float_as_uint(keys.first[i]) & 0x7fffffffu,
                 __float_as_uint(keys.second[i]) & 0x7fffffffu));
    // of the largest so far; the two last ones hold numbers below 8, and what is none
    const uint32_t before = 254 - (__float_as_uint(my.unit[i]) >> 23);
    const uint32_t after = min(max(before, largest >> 23), 253u);
    my.unit[i] = __uint_as_float((254 - after) << 23);
    shrinks.of_unit[i] = __uint_as_float(after - before < 127 ? (127 + before - after) << 23 : 0);
  }
}

// Turns the scores of some heads, all 64 keys, into weights for each 128 latents. A lane has two
// neighbouring keys.
template <int kHeads>
__device__ __forceinline__ void put_weights(Sums<kHeads>& my, Shrinks<kHeads>& shrinks,
                                            uint32_t tile, uint2 mask, uint32_t base, int group,
                                            int warp, int lane) {
  using Shape = Layout<kHeads, Form::kWarpgroups>;
  constexpr int kMine = kHeads / 4;
  const uint32_t bits = (lane < 16 ? mask.x : mask.y) >> 2 * (lane & 15);
  const uint32_t at = (group * kHeads + warp * kMine) * 4, tops = base + Shape::kTops + at;
  const uint32_t sums = base + Shape::kSums + group * Shape::kSumBytes;
  const float4 first = load_shared_float4(tile + 2 * lane * kRecord + kScalesAt);
  const float4 second = load_shared_float4(tile + (2 * lane + 1) * kRecord + kScalesAt);
  Keys<kHeads> keys;
  float top[kMine];
  bool moves = false;
#pragma unroll
  for (int i = 0; i < kMine; i += 4) {
    const float4 factor = load_shared_float4(base + Shape::kFactors + (warp * kMine + i) * 4);
    const float4 before = load_shared_float4(tops + i * 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int head = warp * kMine + i + k;
      float2 s = load_shared_float2(sums + (head * kSumStride + 2 * lane) * 4);
      s.x = (bits & 1) != 0 ? s.x * part_of(factor, k) : -INFINITY;
      s.y = (bits & 2) != 0 ? s.y * part_of(factor, k) : -INFINITY;
      top[i + k] = part_of(before, k);
      keys.score[i + k] = s;
      moves = moves || fmaxf(s.x, s.y) > top[i + k] + kSlack;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keys.first[i] = part_of(first, i) * my.unit[i];
    keys.second[i] = part_of(second, i) * my.unit[i];
    moves = moves || fmaxf(fabsf(keys.first[i]), fabsf(keys.second[i])) >= 2.0f;
    shrinks.of_unit[i] = 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) shrinks.of_head[i] = 1.0f;
  const bool any = __any_sync(~0u, moves);
  if (any) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keys.first[i] = part_of(first, i);
      keys.second[i] = part_of(second, i);
    }
    move_bases(my, keys, top, shrinks);
    // before others' bases are written all lanes have read theirs
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keys.first[i] *= my.unit[i];
      keys.second[i] *= my.unit[i];
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) my.total[i] *= shrinks.of_head[i];
  }
  const uint32_t weights = base + Shape::kWeights + group * Shape::kWeightBytes + lane % 4 * 4;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    // no key so far: nothing to subtract, and no difference of infinities
    const float from = top[i] == -INFINITY ? 0.0f : top[i];
    const float2 s = make_float2(exp2_of(keys.score[i].x - from), exp2_of(keys.score[i].y - from));
    my.total[i] += s.x + s.y;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_shared(weights + k * Shape::kOperand + swizzled(warp * kMine + i, lane / 4),
                   pack_half(s.x * keys.first[k], s.y * keys.second[k]));
    }
  }
  if (lane == 0) {
    const float(&x)[kMine] = shrinks.of_head;
#pragma unroll
    for (int i = 0; i < kMine; i += 4) {
      store_shared(base + Shape::kShrinks + at + i * 4,
                   make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
      if (any) store_shared(tops + i * 4, make_float4(top[i], top[i + 1], top[i + 2], top[i + 3]));
    }
    store_shared(base + Shape::kMoved + (group * 4 + warp) * 4, any ? 1u : 0u);
  }
  publish_to_async();
}

// Brings sums to new bases and units.
template <int kHeads>
__device__ __forceinline__ void shrink_sums(Sums<kHeads>& my, const float (&of_unit)[4],
                                            uint32_t base, int group, int lane) {
  using Shape = Layout<kHeads, Form::kWarpgroups>;
  const uint4 moved = load_shared_uint4(base + Shape::kMoved + group * 16);
  if ((moved.x | moved.y | moved.z | moved.w) == 0) return;
#pragma unroll
  for (int j = 0; j < kHeads / 8; ++j) {
    const float2 x = load_shared_float2(base + Shape::kShrinks +
                                        (group * kHeads + 8 * j + 2 * (lane & 3)) * 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        my.out[i][4 * j + k] *= ((k & 1) != 0 ? x.y : x.x) * of_unit[i / 2];
      }
    }
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_WEIGHTS_CUH
