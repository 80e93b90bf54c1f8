// Sparse MLA for few heads: queries, scores, softmax and sums of one tile of keys.
#ifndef FD_DSA_SPARSE_MLA_NARROW_TILE_CUH
#define FD_DSA_SPARSE_MLA_NARROW_TILE_CUH

#include "sparse_mla_narrow_layout.cuh"
#include "sparse_mla_values.cuh"

namespace fd_dsa::narrow {

#if defined(FD_DSA_HOPPER)

// A warp has 128 latents and 16 roped values of every key. In products, a thread (g, t), that is
// lane 4g + t, has heads g, or 2t and 2t + 1, of every 8.
template <int kHeads>
struct Queries {
  static constexpr int kEights = kHeads / 8;
  // float16, [step of 16 latents]: latents 4t to 4t + 3 of head g
  uint32_t latents[8][kEights][2];
  uint32_t roped[kEights][2];
};

template <int kHeads>
struct State {
  static constexpr int kEights = kHeads / 8, kMine = kHeads / 4;
  // [2i], [2i + 1]: latents 16g + 4i and the next, and the next two
  float out[8][kEights][4];
  // of the heads whose softmax this warp does; the sum is one of each lane
  float top[kMine], total[kMine], factor[kMine];
  // biased exponent of the largest scale so far: weights are in units of it
  uint32_t exponent;
};

__device__ __forceinline__ uint32_t largest_magnitude(uint32_t x) {
  return max(x & 0x7fffu, x >> 16 & 0x7fffu);
}

// Loads queries and brings them into the range of float16 by a power of two a head.
template <int kHeads, Form kForm>
__device__ __forceinline__ void load_queries(const FdDsaSparseMla& job, int64_t token,
                                             Queries<kHeads>& queries, State<kHeads>& state,
                                             uint32_t base, int group, int warp, int lane) {
  using Shape = Layout<kHeads, kForm>;
  constexpr int kEights = kHeads / 8, kMine = kHeads / 4;
  const int t = lane % 4;
  const uint32_t tops = base + Shape::kSums + group * Shape::kSumBytes;
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const int head = 8 * j + lane / 4;
    const bool is_head = head < job.num_heads;
    const __nv_bfloat16* row = static_cast<const __nv_bfloat16*>(job.q) +
                               (token * job.num_heads + (is_head ? head : 0)) * kWidth;
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 x =
          __ldcs(reinterpret_cast<const uint2*>(row + warp * 128 + i * 16 + t * 4));
      queries.latents[i][j][0] = is_head ? x.x : 0;
      queries.latents[i][j][1] = is_head ? x.y : 0;
      top = max(top, max(largest_magnitude(queries.latents[i][j][0]),
                         largest_magnitude(queries.latents[i][j][1])));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t x = __ldcs(reinterpret_cast<const uint32_t*>(
          row + kRank + warp * 16 + i * 8 + t * 2));
      queries.roped[j][i] = is_head ? x : 0;
    }
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    top = max(top, __shfl_xor_sync(~0u, top, 2));
    if (t == 0) store_shared(tops + (warp * kHeads + 8 * j + lane / 4) * 4, top);
  }
  named_barrier(kOfFirst + group, 128);
  auto exponent_of = [&](int head) {
    uint32_t top = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) top = max(top, load_shared(tops + (w * kHeads + head) * 4));
    return max(top >> 7, 64u);
  };
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const float up = __uint_as_float((268 - exponent_of(8 * j + lane / 4)) << 23);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t& x = queries.latents[i][j][k];
        x = pack_half(low_of(x) * up, high_of(x) * up);
      }
      uint32_t& x = queries.roped[j][k];
      x = pack_bfloat16(low_of(x) * up, high_of(x) * up);
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const float back = __uint_as_float((exponent_of(warp * kMine + i) - 14) << 23);
    state.factor[i] = back * job.softmax_scale * 1.4426950408889634f;
  }
  // before others write sums here
  named_barrier(kOfFirst + group, 128);
}

// The largest of a warp's numbers; NaN where there is one.
__device__ __forceinline__ float largest_of_warp(float x) {
  const int32_t bits = __float_as_int(x);
  const int32_t top = __reduce_max_sync(~0u, bits >= 0 ? bits : bits ^ 0x7fffffff);
  return __int_as_float(top >= 0 ? top : top ^ 0x7fffffff);
}

// Adds up the scores of some heads, all 64 keys, and turns them into weights. A lane has 2 keys:
// i and i + 8 of 16.
template <int kHeads>
__device__ __forceinline__ void put_weights(State<kHeads>& state, uint2 mask, uint32_t sums,
                                            uint32_t weights, uint32_t shrinks, int warp,
                                            int lane) {
  constexpr int kMine = kHeads / 4;
  const uint32_t bits = (lane < 16 ? mask.x : mask.y) >> ((lane >> 3 & 1) * 16 + (lane & 7));
  float shrink[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int head = warp * kMine + i;
    float2 s = load_shared_float2(sums + (head * kSumStride + 2 * lane) * 4);
#pragma unroll
    for (int w = 1; w < 4; ++w) {
      const float2 x =
          load_shared_float2(sums + ((w * kHeads + head) * kSumStride + 2 * lane) * 4);
      s = make_float2(s.x + x.x, s.y + x.y);
    }
    s.x = (bits & 1) != 0 ? s.x * state.factor[i] : -INFINITY;
    s.y = (bits & 256) != 0 ? s.y * state.factor[i] : -INFINITY;
    const float top = fmaxf(state.top[i], largest_of_warp(fmaxf(s.x, s.y)));
    // no key so far: nothing to subtract, and no difference of infinities
    const float from = top == -INFINITY ? 0.0f : top;
    shrink[i] = exp2_of(state.top[i] - from);
    state.top[i] = top;
    s = make_float2(exp2_of(s.x - from), exp2_of(s.y - from));
    state.total[i] = fmaf(state.total[i], shrink[i], s.x + s.y);
    store_shared(weights + (head * kWeightStride + 2 * lane) * 4, s);
  }
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kMine; i += 2) {
      store_shared(shrinks + (warp * kMine + i) * 4, make_float2(shrink[i], shrink[i + 1]));
    }
  }
}

// This warp's part of the scores of a tile: [16 keys][8 heads].
template <int kHeads>
struct Scores {
  float sums[kSixteens][kHeads / 8][4];
};

// Scores over 32 of this warp's latents.
template <int kHeads>
__device__ __forceinline__ void add_scores(Scores<kHeads>& scores, const Queries<kHeads>& queries,
                                           uint32_t tile, int step, int warp, int lane) {
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
#pragma unroll
      for (int j = 0; j < kHeads / 8; ++j) {
        multiply_add<false>(scores.sums[m][j], a, queries.latents[2 * step + half][j]);
      }
    }
  }
}

// Scales scores, adds those over this warp's roped values, and puts them where their heads' warp
// finds them. Returns the bits of the largest scale.
template <int kHeads>
__device__ __forceinline__ uint32_t put_scores(Scores<kHeads>& scores,
                                               const Queries<kHeads>& queries, uint32_t tile,
                                               uint32_t sums, int warp, int lane) {
  constexpr int kEights = kHeads / 8;
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
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) scores.sums[m][j][k] *= scale[m][k / 2];
      multiply_add<true>(scores.sums[m][j], roped[m], queries.roped[j]);
    }
  }
  const uint32_t to = sums + ((warp * kHeads + 2 * (lane & 3)) * kSumStride + lane / 4 * 2) * 4;
#pragma unroll
  for (int m = 0; m < kSixteens; ++m) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float(&x)[4] = scores.sums[m][j];
        store_shared(to + ((8 * j + k) * kSumStride + m * 16) * 4, make_float2(x[k], x[k + 2]));
      }
    }
  }
  return __reduce_max_sync(~0u, top);
}

// Brings the sums of latents to the new top, and to the unit of the largest scale so far.
template <int kHeads>
__device__ __forceinline__ void shrink_out(State<kHeads>& state, uint32_t scale_top,
                                           uint32_t shrinks, int lane) {
  constexpr int kEights = kHeads / 8;
  const uint32_t exponent = max(state.exponent, scale_top >> 23);
  // 2 to the old exponent minus the new one
  const int32_t down = 127 + static_cast<int32_t>(state.exponent) - static_cast<int32_t>(exponent);
  const float of_exponent = __uint_as_float(static_cast<uint32_t>(max(down, 0)) << 23);
  state.exponent = exponent;
  float2 shrink[kEights];
  bool is_same = true;
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const float2 x = load_shared_float2(shrinks + (8 * j + 2 * (lane & 3)) * 4);
    shrink[j] = make_float2(x.x * of_exponent, x.y * of_exponent);
    is_same = is_same && shrink[j].x == 1.0f && shrink[j].y == 1.0f;
  }
  if (__all_sync(~0u, is_same)) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) state.out[i][j][k] *= (k & 1) != 0 ? shrink[j].y : shrink[j].x;
    }
  }
}

// Adds this warp's latents of 16 keys times their weights.
template <int kHeads>
__device__ __forceinline__ void add_latents(State<kHeads>& state, uint32_t tile, uint32_t weights,
                                            int step, float unit, int warp, int lane) {
  constexpr int kEights = kHeads / 8;
  const int g = lane / 4, t = lane & 3;
  const uint32_t rows = tile + (2 * t + step * 16) * kRecord;
  // of keys 2t, 2t + 8, 2t + 1, 2t + 9: 16 latents each
  uint4 codes[4];
  float scale[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t row = rows + ((k >> 1) + (k & 1) * 8) * kRecord;
    codes[k] = load_shared_uint4(row + warp * 128 + g * 16);
    scale[k] = __uint_as_float(load_shared(row + kScalesAt + warp * 4)) * unit;
  }
  uint32_t b[kEights][2];
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const float4 x =
        load_shared_float4(weights + ((8 * j + g) * kWeightStride + step * 16 + 4 * t) * 4);
    b[j][0] = pack_half(x.x * scale[0], x.y * scale[1]);
    b[j][1] = pack_half(x.z * scale[2], x.w * scale[3]);
  }
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
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      multiply_add<false>(state.out[2 * i][j], first, b[j]);
      multiply_add<false>(state.out[2 * i + 1][j], last, b[j]);
    }
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_TILE_CUH
