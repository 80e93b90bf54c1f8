// Sparse MLA for 9 to 32 heads: a tile of keys in products of a warpgroup.
//
// A warp has 16 keys of a tile in the scores, and 32 of each 128 latents in the sums. Either way
// codes become float16 in registers, once for all heads.
#ifndef FD_DSA_SPARSE_MLA_NARROW_PRODUCTS_CUH
#define FD_DSA_SPARSE_MLA_NARROW_PRODUCTS_CUH

#include "sparse_mla_narrow_tile.cuh"
#include "wgmma_rows.cuh"

namespace fd_dsa::narrow {

#if defined(FD_DSA_HOPPER)

// Of a thread (g, t), that is lane 4g + t of warp w.
template <int kHeads>
struct Sums {
  static constexpr int kMine = kHeads / 4;
  // [2G + i][4j + 2k + l]: latent 128G + 32w + 16i + 2g + k of head 8j + 2t + l
  float out[8][kHeads / 2];
  // of the heads whose softmax this warp does, one of each lane
  float total[kMine];
  // a power of two that brings the scales so far of each 128 latents below 2: weights have it
  float unit[4];
};

// Rows of products, two steps of 16 columns at a time: all but one of these may be at work. What
// does not fit into registers beside the sums would make products wait for each other.
template <int kHeads>
struct Rows {
  static constexpr int kDepth = kHeads > 16 ? 2 : 3;
  uint32_t step[kDepth][2][4];

  // Those of batch `i`, once the products that read them are done.
  __device__ __forceinline__ uint32_t (&next(int i))[2][4] {
    if (i >= kDepth) wgmma_wait<kDepth - 1>();
    return step[i % kDepth];
  }
};

// What a lane has of the queries of its warp's heads: four latents in four places, two roped.
template <int kHeads>
struct QueryRows {
  static constexpr int kEach = kHeads / 8;
  uint2 latents[kEach][4];
  uint32_t roped[kEach];
};

// Asks for a token's queries; 8 warps.
template <int kHeads>
__device__ __forceinline__ void load_queries(QueryRows<kHeads>& rows, const FdDsaSparseMla& job,
                                             int64_t token, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < rows.kEach; ++i) {
    const int head = warp * rows.kEach + i;
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

// Writes queries as an operand: float16 latents, in the order in which scores have those of keys,
// and roped values in bfloat16; and what each head's scores are to be multiplied with. 8 warps.
template <int kHeads>
__device__ __forceinline__ void put_queries(const QueryRows<kHeads>& rows, float softmax_scale,
                                            uint32_t base, int warp, int lane) {
  using Shape = Layout<kHeads, Form::kWarpgroups>;
#pragma unroll
  for (int i = 0; i < rows.kEach; ++i) {
    const int head = warp * rows.kEach + i;
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
    if (lane < 2) store_shared(base + Shape::kTops + (lane * kHeads + head) * 4, -INFINITY);
    if (lane == 0) {
      const float back = __uint_as_float((exponent - 14) << 23);
      store_shared(base + Shape::kFactors + head * 4, back * softmax_scale * 1.4426950408889634f);
    }
  }
  publish_to_async();
  named_barrier(kOfBoth, 256);
}

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

// Scores of a tile, put where their heads' warp finds them.
template <int kHeads>
__device__ __forceinline__ void put_scores(uint32_t tile, uint32_t query, uint32_t sums, int warp,
                                           int lane) {
  constexpr int kOperand = Layout<kHeads, Form::kWarpgroups>::kOperand;
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
    // the third of a group's four: all of the group before are done
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

// Adds latents times weights; the tile is left to the copying warps.
template <int kHeads>
__device__ __forceinline__ void add_tile(Sums<kHeads>& my, uint32_t tile, uint32_t weight,
                                         uint32_t empty, int warp, int lane) {
  constexpr int kOperand = Layout<kHeads, Form::kWarpgroups>::kOperand;
  const Operand weights = k_major(weight);
  const uint32_t row = tile + (lane & 15) * kRecord + (lane >> 4) * 16 + warp * 32;
  Rows<kHeads> rows;
  uint32_t words[3][4];
  load_matrices_transposed(words[0], row);
  load_matrices_transposed(words[1], row + 128);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    // 16 keys after 16 keys, of each 128 latents after 128
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
      // two latents of a key, and of the next one
      const uint32_t pairs = __byte_perm(word[k], 0, 0x3120);
      step[k / 2][k % 2 * 2] = values_of_codes<false>(pairs);
      step[k / 2][k % 2 * 2 + 1] = values_of_codes<true>(pairs);
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      wgmma_rows<kHeads, false>(my.out[2 * latent + k], step[k],
                                weights.at(latent * kOperand + key * 32), true);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 8; ++i) pin(my.out[i]);
}

template <int kHeads>
__device__ __forceinline__ void start(Sums<kHeads>& my) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int k = 0; k < kHeads / 2; ++k) my.out[i][k] = 0.0f;
    // of no scale yet
    if (i < 4) my.unit[i] = __uint_as_float(253u << 23);
  }
#pragma unroll
  for (int i = 0; i < kHeads / 4; ++i) my.total[i] = 0.0f;
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_PRODUCTS_CUH
