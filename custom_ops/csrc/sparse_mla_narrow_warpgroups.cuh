// Sparse MLA for 9 to 32 heads, with two warpgroups that take turns with tiles.
//
// Keys and latents are the 64 rows of a warpgroup's GEMMs. They are in registers, where codes
// become float16 once for all heads. Heads are the columns, in shared memory: queries once a token,
// weights once a tile. A warp has 16 keys of a tile in the scores, and 32 of each 128 latents in
// the sums. Scores and weights therefore go through shared memory, where each warp computes the
// softmax of some heads.
#pragma once

#include "sparse_mla_narrow_warpgroups_weights.cuh"

namespace fd_dsa::narrow::warpgroups {

#if defined(FD_DSA_HOPPER)

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
