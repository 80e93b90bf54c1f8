// Sparse MLA for 9 to 32 heads: shared memory, queries, and the scores of a tile.
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

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow::warpgroups
