// Sparse MLA for 9 to 32 heads, with two warpgroups that take turns with tiles.
//
// Keys and latents are the 64 rows of a warpgroup's GEMMs. They are in registers, where codes
// become float16 once for all heads. Heads are the columns, in shared memory: queries once a token,
// weights once a tile. A warp has 16 keys of a tile in the scores, and 32 of each 128 latents in
// the sums. Scores and weights therefore go through shared memory, where each warp computes the
// softmax of some heads.
#pragma once

#include "sparse_mla_narrow.cuh"
#include "wgmma.cuh"

namespace fd_dsa::narrow::warpgroups {

// Offsets in shared memory, in bytes.
template <int kColumns>
struct Layout {
  static constexpr int kHeads = kColumns, kGroups = 2, kParts = 1;
  static constexpr int kStages = kHeads > 16 ? 3 : 4;
  // tiles of a warpgroup until it returns to the same stage
  static constexpr int kVisits = kStages % 2 == 0 ? kStages / 2 : kStages;
  // 64 columns of an operand
  static constexpr int kOperand = kHeads * 128;
  static constexpr int kRing = 0;
  static constexpr int kQueries = kRing + kStages * kTileBytes;
  static constexpr int kWeights = kQueries + 9 * kOperand;
  // one operand per 128 latents, with their scales multiplied in
  static constexpr int kWeightBytes = 4 * kOperand;
  static constexpr int kSums = kWeights + kGroups * kWeightBytes;
  static constexpr int kSumBytes = kHeads * kSumStride * 4;
  static constexpr int kFactors = kSums + kGroups * kSumBytes;
  static constexpr int kRowMaxOffset = kFactors + kHeads * 4;
  static constexpr int kRescaleOffset = kRowMaxOffset + kGroups * kHeads * 4;
  static constexpr int kMaxChangedOffset = kRescaleOffset + kGroups * kHeads * 4;
  static constexpr int kOwnStats = kMaxChangedOffset + kGroups * 16;
  static constexpr int kStats = kOwnStats + kGroups * kHeads * 8;
  static constexpr int kMasks = kStats + kHeads * 8;
  static constexpr int kBarriers = kMasks + kStages * 8;
  static constexpr int kBytes = kBarriers + kStages * 24;
  static constexpr int kThreads = (kGroups * 4 + kCopyWarps) * 32;
  static constexpr int kComputeRegisters = 240, kCopyRegisters = 24;
  // After the last tile, the ring holds a block's part for its cluster, and the memory of the
  // queries holds the exchange between warpgroups.
  static constexpr int kPartBytes = kHeads * kPartStride * 4, kExchange = kQueries;
  static_assert(kPartBytes <= kExchange && kExchange + kHeads * kRank * 4 <= kSums);
  static_assert(kBytes <= 232448);
  static_assert(kQueries % 1024 == 0 && kWeights % 1024 == 0);

  // A barrier for each warpgroup, which waits for its own tiles only. With a shared barrier it
  // would skip phases, and could take an earlier phase for its own.
  static constexpr int kFulls = 2;
  static __device__ __forceinline__ uint32_t full(uint32_t base, uint32_t stage, int group) {
    return base + kBarriers + stage * 24 + group * 8;
  }
  static __device__ __forceinline__ uint32_t empty(uint32_t base, uint32_t stage) {
    return full(base, stage, 2);
  }
};

#if defined(FD_DSA_HOPPER)

// The sums of a thread (g, t), which is lane 4g + t of warp w.
template <int kHeads>
struct Sums {
  static constexpr int kSoftmaxHeads = kHeads / 4;
  // [2G + i][4j + 2k + l]: latent 128G + 32w + 16i + 2g + k of head 8j + 2t + l
  float out[8][kHeads / 2];
  // partial sums of the lane, of the heads whose softmax this warp computes
  float total[kSoftmaxHeads];
  // A power of two that brings the scales so far of each 128 latents below 2. It is a factor of the
  // weights.
  float unit[4];
};

// ---- queries

// A lane's queries of its warp's heads: four times four latents, and two roped values.
template <int kHeads>
struct QueryRows {
  static constexpr int kWarpHeads = kHeads / 8;
  uint2 latents[kWarpHeads][4];
  uint32_t roped[kWarpHeads];
};

// Loads a token's queries into registers; 8 warps call it.
template <int kHeads>
__device__ __forceinline__ void load_queries(QueryRows<kHeads>& rows, const FdDsaSparseMla& job,
                                             int64_t token, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < rows.kWarpHeads; ++i) {
    const int head = warp * rows.kWarpHeads + i;
    const bool is_head = head < job.num_heads;
    const __nv_bfloat16* row = static_cast<const __nv_bfloat16*>(job.q) +
                               (token * job.num_heads + (is_head ? head : 0)) * kWidth;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint2 x = __ldcs(reinterpret_cast<const uint2*>(row) + k * 32 + lane);
      rows.latents[i][k] = is_head ? x : make_uint2(0, 0);
    }
    const uint32_t x = __ldcs(reinterpret_cast<const uint32_t*>(row + kRank) + lane);
    rows.roped[i] = is_head ? x : 0;
  }
}

// Writes queries as an operand, and the factor of each head's scores; 8 warps call it.
//
// The operand has float16 latents, in the order in which the scores have the latents of keys, and
// bfloat16 roped values.
template <int kHeads>
__device__ __forceinline__ void store_queries(const QueryRows<kHeads>& rows, float softmax_scale,
                                              uint32_t base, int warp, int lane) {
  using Shape = Layout<kHeads>;
#pragma unroll
  for (int i = 0; i < rows.kWarpHeads; ++i) {
    const int head = warp * rows.kWarpHeads + i;
    uint32_t top = largest_magnitude(rows.roped[i]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint2 x = rows.latents[i][k];
      top = max(top, max(largest_magnitude(x.x), largest_magnitude(x.y)));
    }
    // into the range of float16 by a power of two
    const uint32_t exponent = max(__reduce_max_sync(~0u, top) >> 7, 64u);
    const float up = __uint_as_float((268 - exponent) << 23);
    const auto times = [up](uint32_t x) { return pack_half(low_of(x) * up, high_of(x) * up); };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t to =
          base + Shape::kQueries + (2 * k + lane / 16) * Shape::kOperand + lane % 4 * 4;
      const uint32_t chunk = lane % 16 / 4 * 2;
      store_shared(to + swizzled(head, chunk), times(rows.latents[i][k].x));
      store_shared(to + swizzled(head, chunk + 1), times(rows.latents[i][k].y));
    }
    store_shared(base + Shape::kQueries + 8 * Shape::kOperand + swizzled(head, lane / 4) +
                     lane % 4 * 4,
                 pack_bfloat16(low_of(rows.roped[i]) * up, high_of(rows.roped[i]) * up));
    if (lane < 2) store_shared(base + Shape::kRowMaxOffset + (lane * kHeads + head) * 4, -INFINITY);
    if (lane == 0) {
      const float back = __uint_as_float((exponent - 14) << 23);
      store_shared(base + Shape::kFactors + head * 4, back * softmax_scale * 1.4426950408889634f);
    }
  }
  publish_to_async();
  named_barrier(kBothBarrier, 256);
}

// ---- scores of a tile

// Rows of GEMMs in batches of two steps of 16 columns.
//
// All batches but one may be in use by GEMMs. If rows did not fit into registers beside the sums,
// the GEMMs would wait for each other.
template <int kHeads>
struct Rows {
  static constexpr int kDepth = kHeads > 16 ? 2 : 3;
  uint32_t step[kDepth][2][4];

  // Returns the rows of batch `i` after the GEMMs that read them have ended.
  __device__ __forceinline__ uint32_t (&next(int i))[2][4] {
    if (i >= kDepth) wgmma_wait<kDepth - 1>();
    return step[i % kDepth];
  }
};

// Adds scores over 128 latents, times the scales of this thread's two keys.
template <int kCount>
__device__ __forceinline__ void add_scaled(float (&to)[kCount], const float (&part)[kCount],
                                           float first, float second) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = fmaf(part[i], (i & 2) != 0 ? second : first, to[i]);
}

__device__ __forceinline__ float part_of(float4 x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// Computes the scores of a tile, and stores them for the softmax.
template <int kHeads>
__device__ __forceinline__ void store_scores(uint32_t tile, uint32_t query, uint32_t sums, int warp,
                                             int lane) {
  constexpr int kOperand = Layout<kHeads>::kOperand;
  const Operand queries = k_major(query);
  const uint32_t row = tile + (warp * 16 + (lane & 15)) * kRecord + (lane >> 4) * 16;
  const uint32_t scales = tile + (warp * 16 + lane / 4) * kRecord + kScalesAt;
  float score[kHeads / 2], part[2][kHeads / 2];
  Rows<kHeads> rows;
  uint32_t words[3][4];
  load_matrices(rows.step[0][0], row + kRopeAt);
  load_matrices(rows.step[0][1], row + kRopeAt + 32);
  load_matrices(rows.step[1][0], row + kRopeAt + 64);
  load_matrices(rows.step[1][1], row + kRopeAt + 96);
  load_matrices(words[0], row);
  load_matrices(words[1], row + 32);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      wgmma_rows<kHeads, true>(score, rows.step[i][k],
                               queries.at(8 * kOperand + (2 * i + k) * 32), i + k > 0);
    }
    wgmma_commit();
  }
  const float4 first = load_shared_float4(scales);
  const float4 second = load_shared_float4(scales + 8 * kRecord);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < 14) load_matrices(words[(i + 2) % 3], row + (i + 2) * 32);
    uint32_t(&step)[2][4] = rows.next(i + 2);
    const uint32_t(&word)[4] = words[i % 3];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      step[k][0] = values_of_codes<false>(word[2 * k]);
      step[k][1] = values_of_codes<false>(word[2 * k + 1]);
      step[k][2] = values_of_codes<true>(word[2 * k]);
      step[k][3] = values_of_codes<true>(word[2 * k + 1]);
    }
    // at the third of a group's four steps, all steps of the previous group have ended
    if (i % 4 == 2 && i > 4) {
      pin(part[(i / 4 + 1) % 2]);
      if (i == 6) pin(score);
      add_scaled(score, part[(i / 4 + 1) % 2], part_of(first, i / 4 - 1),
                 part_of(second, i / 4 - 1));
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      wgmma_rows<kHeads, false>(part[i / 4 % 2], step[k],
                                queries.at(i / 2 * kOperand + (i % 2 * 2 + k) * 32),
                                i % 4 + k > 0);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  pin(part[1]);
  add_scaled(score, part[1], first.w, second.w);
  const uint32_t to = sums + (2 * (lane & 3) * kSumStride + warp * 16 + lane / 4) * 4;
#pragma unroll
  for (int j = 0; j < kHeads / 8; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_shared(to + ((8 * j + k % 2) * kSumStride + k / 2 * 8) * 4, score[4 * j + k]);
    }
  }
}

// ---- weights of a tile

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

// ---- sums of a tile

// Adds latents times weights, and releases the tile to the copying warps.
template <int kHeads>
__device__ __forceinline__ void add_tile(Sums<kHeads>& state, uint32_t tile, uint32_t weight,
                                         uint32_t empty, int warp, int lane) {
  constexpr int kOperand = Layout<kHeads>::kOperand;
  const Operand weights = k_major(weight);
  const uint32_t row = tile + (lane & 15) * kRecord + (lane >> 4) * 16 + warp * 32;
  Rows<kHeads> rows;
  uint32_t words[3][4];
  load_matrices_transposed(words[0], row);
  load_matrices_transposed(words[1], row + 128);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    // 16 keys after 16 keys, with 128 latents after 128 for each
    const int key = i / 4, latent = i % 4, next = i + 2;
    if (i < 14) {
      load_matrices_transposed(words[next % 3], row + next / 4 * 16 * kRecord + next % 4 * 128);
    } else if (i == 14) {
      warp_arrive(empty, lane);
    }
    uint32_t(&step)[2][4] = rows.next(i);
    const uint32_t(&word)[4] = words[i % 3];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // two latents of a key and of the next key
      const uint32_t pairs = __byte_perm(word[k], 0, 0x3120);
      step[k / 2][k % 2 * 2] = values_of_codes<false>(pairs);
      step[k / 2][k % 2 * 2 + 1] = values_of_codes<true>(pairs);
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      wgmma_rows<kHeads, false>(state.out[2 * latent + k], step[k],
                                weights.at(latent * kOperand + key * 32), true);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 8; ++i) pin(state.out[i]);
}

// Attends to all tiles of one warpgroup.
template <int kHeads>
__device__ __forceinline__ void attend_tiles(Sums<kHeads>& state, uint32_t base, Tiles tiles,
                                             int group, int warp, int lane) {
  using Shape = Layout<kHeads>;
  const uint32_t sums = base + Shape::kSums + group * Shape::kSumBytes;
  const uint32_t weights = base + Shape::kWeights + group * Shape::kWeightBytes;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int k = 0; k < kHeads / 2; ++k) state.out[i][k] = 0.0f;
    // the unit before the first scale
    if (i < 4) state.unit[i] = __uint_as_float(253u << 23);
  }
#pragma unroll
  for (int i = 0; i < kHeads / 4; ++i) state.total[i] = 0.0f;
  uint32_t stage = group, parity = 0;
  int visits = 0;
  for (int32_t at = tiles.first + group * tiles.step; at < tiles.end; at += 2 * tiles.step) {
    const uint32_t tile = base + Shape::kRing + stage * kTileBytes;
    const uint32_t empty = Shape::empty(base, stage);
    barrier_wait(Shape::full(base, stage, group), parity);
    const uint32_t masks = base + Shape::kMasks + stage * 8;
    const uint2 mask = make_uint2(load_shared(masks), load_shared(masks + 4));
    if ((mask.x | mask.y) != 0) {
      store_scores<kHeads>(tile, base + Shape::kQueries, sums, warp, lane);
      named_barrier(kFirstBarrier + group, 128);
      Rescales<kHeads> rescales;
      store_weights<kHeads>(state, rescales, tile, mask, base, group, warp, lane);
      named_barrier(kFirstBarrier + group, 128);
      rescale_sums<kHeads>(state, rescales.unit_rescale, base, group, lane);
      add_tile<kHeads>(state, tile, weights, empty, warp, lane);
    } else {
      warp_arrive(empty, lane);
    }
    stage += 2;
    if (stage >= Shape::kStages) stage -= Shape::kStages;
    if (++visits == Shape::kVisits) {
      visits = 0;
      parity ^= 1;
    }
  }
}

// ---- results

// Stores row maxima and totals for the other warpgroup.
//
// Both warpgroups have then finished with tiles, queries and weights.
template <int kHeads>
__device__ __forceinline__ void store_stats(const Sums<kHeads>& state, uint32_t base, int group,
                                            int warp, int lane) {
  using Shape = Layout<kHeads>;
  constexpr int kSoftmaxHeads = kHeads / 4;
#pragma unroll
  for (int i = 0; i < kSoftmaxHeads; ++i) {
    const int at = group * kHeads + warp * kSoftmaxHeads + i;
    const float total = warp_sum(state.total[i]);
    const float top = __uint_as_float(load_shared(base + Shape::kRowMaxOffset + at * 4));
    if (lane == 0) store_shared(base + Shape::kOwnStats + at * 8, make_float2(top, total));
  }
  named_barrier(kNextBothBarrier, 256);
}

// The weights of this warpgroup's part and of the other's for a head.
struct Shares {
  float mine, other;
};

// Adds up the parts of both warpgroups of a token.
//
// Each warpgroup gets half of the other's heads, in registers like its own. `share(head, own,
// other)` computes shares from row maxima and totals. `put(head, latent, sums)` takes two
// neighbouring latents.
template <int kHeads, int kGroup, typename Share, typename Put>
__device__ __forceinline__ void exchange(const Sums<kHeads>& state, uint32_t base, int warp,
                                         int lane, Share share, Put put) {
  using Shape = Layout<kHeads>;
  constexpr int kHalf = kHeads / 16, kOwn = kGroup * kHalf, kOther = kHalf - kOwn;
  constexpr uint32_t kBytes = 8 * kHalf * 128 * 16;
  const uint32_t place = base + Shape::kExchange + (warp * 32 + lane) * 16;
  // removes the units again
  float back[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    back[i] = inverse_of_power(state.unit[i]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const float* x = state.out[i] + 4 * (kOther + j);
      const float by = back[i / 2];
      store_shared(place + kGroup * kBytes + (i * kHalf + j) * 2048,
                   make_float4(x[0] * by, x[1] * by, x[2] * by, x[3] * by));
    }
  }
  exchange_barrier();
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const int head = 8 * (kOwn + j) + 2 * (lane & 3);
    Shares shares[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t at = base + Shape::kOwnStats + (head + k) * 8;
      shares[k] = share(head + k, load_shared_float2(at + kGroup * kHeads * 8),
                        load_shared_float2(at + (1 - kGroup) * kHeads * 8));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 y = load_shared_float4(place + (1 - kGroup) * kBytes + (i * kHalf + j) * 2048);
      const float* x = state.out[i] + 4 * (kOwn + j);
      const int latent = i / 2 * 128 + warp * 32 + i % 2 * 16 + lane / 4 * 2;
      const float first = shares[0].mine * back[i / 2], second = shares[1].mine * back[i / 2];
      put(head, latent,
          make_float2(fmaf(y.x, shares[0].other, x[0] * first),
                      fmaf(y.z, shares[0].other, x[2] * first)));
      put(head + 1, latent,
          make_float2(fmaf(y.y, shares[1].other, x[1] * second),
                      fmaf(y.w, shares[1].other, x[3] * second)));
    }
  }
}

// Writes the result of a block that has all keys of a token, or stores its part for the cluster.
template <int kHeads, int kGroup>
__device__ __forceinline__ void finish(const FdDsaSparseMla& job, int64_t token,
                                       const Sums<kHeads>& state, uint32_t base, bool is_alone,
                                       int warp, int lane) {
  using Shape = Layout<kHeads>;
  const int64_t row = token * job.num_heads;
  const auto share = [&](int head, float2 a, float2 b) {
    const float top = fmaxf(a.x, b.x), from = top == -INFINITY ? 0.0f : top;
    const float mine = exp2_of(a.x - from), other = exp2_of(b.x - from);
    const float total = fmaf(b.y, other, a.y * mine);
    const bool tells = warp == 0 && lane < 4;
    if (!is_alone) {
      if (tells) store_shared(base + Shape::kStats + head * 8, make_float2(top, total));
      return Shares{mine, other};
    }
    if (tells && head < job.num_heads && job.lse != nullptr) {
      job.lse[row + head] = lse_of(top, total);
    }
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
    return Shares{mine * factor, other * factor};
  };
  if (!is_alone) {
    exchange<kHeads, kGroup>(state, base, warp, lane, share, [&](int head, int latent, float2 x) {
      store_shared(base + Shape::kRing + (head * kPartStride + latent) * 4, x);
    });
  } else if (job.out_is_bfloat16 != 0) {
    auto* out = static_cast<__nv_bfloat16*>(job.out) + row * kRank;
    exchange<kHeads, kGroup>(state, base, warp, lane, share, [&](int head, int latent, float2 x) {
      if (head >= job.num_heads) return;
      __stcs(reinterpret_cast<uint32_t*>(out + head * kRank + latent), pack_bfloat16(x.x, x.y));
    });
  } else {
    auto* out = static_cast<float*>(job.out) + row * kRank;
    exchange<kHeads, kGroup>(state, base, warp, lane, share, [&](int head, int latent, float2 x) {
      if (head >= job.num_heads) return;
      __stcs(reinterpret_cast<float2*>(out + head * kRank + latent), x);
    });
  }
}

#endif  // FD_DSA_HOPPER

// Attends with a cluster of blocks for each token.
template <int kHeads>
__global__ void __launch_bounds__(Layout<kHeads>::kThreads, 1)
    kernel(const __grid_constant__ FdDsaSparseMla job) {
#if defined(FD_DSA_HOPPER)
  using Shape = Layout<kHeads>;
  const Place place = begin<Shape>(job);
  if (place.warp >= 4 * Shape::kGroups) {
    copy_and_wait<Shape>(job, place, 4 * Shape::kGroups);
    return;
  }
  more_registers<Shape::kComputeRegisters>();
  const auto [base, blocks, rank, warp, lane, token, tiles] = place;
  const bool is_alone = blocks == 1;
  const int group = warp / 4, member = warp % 4;
  QueryRows<kHeads> rows;
  load_queries(rows, job, token, warp, lane);
  store_queries(rows, job.softmax_scale, base, warp, lane);
  Sums<kHeads> sums;
  attend_tiles<kHeads>(sums, base, tiles, group, member, lane);
  store_stats<kHeads>(sums, base, group, member, lane);
  if (group == 0) {
    finish<kHeads, 0>(job, token, sums, base, is_alone, member, lane);
  } else {
    finish<kHeads, 1>(job, token, sums, base, is_alone, member, lane);
  }
  if (!is_alone) combine<Shape>(job, token, base, rank, blocks);
#endif
}

}  // namespace fd_dsa::narrow::warpgroups
