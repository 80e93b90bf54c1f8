// Sparse MLA for blocks of 64 heads: queries, and the two computing warpgroups.
#pragma once

#include <cmath>

#include "sparse_mla_wide_tiles.cuh"

#if defined(FD_DSA_HOPPER)
namespace fd_dsa::wide {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// A larger score updates the row maximum only if it is larger by more than this power of two.
// Weights then stay below 2^8, which float16 and bfloat16 hold as well as values below 1.
constexpr float kSlack = 8.0f;

// ---- queries

__device__ __forceinline__ uint32_t largest_magnitude(uint4 x) {
  uint32_t top = 0;
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    top = max(top, max(words[i] & 0x7fffu, words[i] >> 16 & 0x7fffu));
  }
  return top;
}

// Multiplies eight bfloat16 values by a power of two, into float16 or bfloat16.
template <bool kHalf>
__device__ __forceinline__ uint4 times(uint4 x, float factor) {
  const uint32_t from[4] = {x.x, x.y, x.z, x.w};
  uint32_t to[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = low_of(from[i]) * factor, high = high_of(from[i]) * factor;
    to[i] = kHalf ? pack_half(low, high) : pack_bfloat16(low, high);
  }
  return {to[0], to[1], to[2], to[3]};
}

// Writes the queries of a block as an operand, and the factor of each head's scores.
//
// For FP8 records the latents are float16. A power of two per head scales the queries into its
// range, and the roped values stay bfloat16.
template <bool kFp8>
__device__ __forceinline__ void store_queries(const FdDsaSparseMla& job, int64_t token,
                                              int first_head, uint32_t base, int warp, int lane) {
  constexpr int kWarpHeads = 8;  // of a warp; all are loaded before the first is used
  uint4 x[kWarpHeads][3];
#pragma unroll
  for (int i = 0; i < kWarpHeads; ++i) {
    const int head = first_head + warp * kWarpHeads + i;
    const bool is_head = head < job.num_heads;
    const uint4* row = static_cast<const uint4*>(job.q) +
                       (token * job.num_heads + (is_head ? head : 0)) * (kWidth / 8) + lane;
    const uint4 zero = {0, 0, 0, 0};
    x[i][0] = is_head ? __ldg(row) : zero;
    x[i][1] = is_head ? __ldg(row + 32) : zero;
    x[i][2] = is_head && lane < 8 ? __ldg(row + 64) : zero;
  }
#pragma unroll
  for (int i = 0; i < kWarpHeads; ++i) {
    const int row = warp * kWarpHeads + i;
    float factor = job.softmax_scale * kLog2E;
    if constexpr (kFp8) {
      const uint32_t top = __reduce_max_sync(
          ~0u, max(max(largest_magnitude(x[i][0]), largest_magnitude(x[i][1])),
                   largest_magnitude(x[i][2])));
      const uint32_t exponent = max(top >> 7, 64u);
      const float up = __uint_as_float((268 - exponent) << 23);
      factor *= __uint_as_float((exponent - 14) << 23);
      x[i][0] = times<true>(x[i][0], up);
      x[i][1] = times<true>(x[i][1], up);
      x[i][2] = times<false>(x[i][2], up);
    }
    const uint32_t to = base + kQuery + lane / 8 * kBlock + swizzled(row, lane % 8);
    store_shared(to, x[i][0]);
    store_shared(to + 4 * kBlock, x[i][1]);
    if (lane < 8) store_shared(to + 8 * kBlock, x[i][2]);
    if (lane == 0) store_shared(base + kFactors + row * 4, factor);
  }
  publish_to_async();
}

// ---- a warpgroup

// A computing warpgroup, which computes the weights of even tiles (kGroup 0) or odd tiles.
//
// It also sums up half of all latents. A thread has two rows, 8 apart, and two neighbouring columns
// in each block of 8. Without kRoped keys have no roped values beside the latents.
template <bool kFp8, int kGroup, bool kRoped = true>
struct ComputeWarpgroup {
  uint32_t base;
  int warp, lane;  // of the warpgroup
  float out[128], scores[32];
  float top[2], total[2];  // per row

  __device__ __forceinline__ ComputeWarpgroup(uint32_t base, int warp, int lane)
      : base(base), warp(warp), lane(lane) {
#pragma unroll
    for (int i = 0; i < 128; ++i) out[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = -INFINITY, total[r] = 0;
    }
  }

  __device__ __forceinline__ int row(int r) const { return warp * 16 + unknown(lane) / 4 + r * 8; }

  template <int kFirst, int kEnd>
  __device__ __forceinline__ void add_scores(uint32_t tile) {
    const Operand queries = k_major(base + kQuery), keys = k_major(tile);
#pragma unroll
    for (int i = kFirst; i < kEnd; ++i) {
      const uint32_t at = i / 4 * kBlock + i % 4 * 32;
      wgmma_scores<!kFp8 || kFirst == 32>(scores, queries.at(at), keys.at(at), i > 0);
    }
    wgmma_commit();
  }

  // Computes the scores of a tile.
  __device__ __forceinline__ void score(int parity) {
    const uint32_t tile = tile_at(base, kGroup);
    barrier_wait(is_full(base, kGroup, 0), parity);
    // The fence is here, because the copying warps would have to wait there for all their copies.
    publish_to_async();
    wgmma_fence();
    add_scores<0, 16>(tile);
    barrier_wait(is_full(base, kGroup, 1), parity);
    publish_to_async();
    wgmma_fence();
    constexpr int kRest = kRoped ? 32 : 28;
    add_scores<16, kRest>(tile);
    add_scores<kRest, kRest + 4>(tile);
    if constexpr (kGroup == 0) {
      // the other warpgroup uses the tensor cores while this one computes weights
      wgmma_wait<1>();
      named_barrier_arrive(kScored, 256);
    }
    wgmma_wait<0>();
    pin(scores);
  }

  // Turns scores into weights, and returns the factor of older sums in `rescale`.
  __device__ __forceinline__ void weigh(float (&rescale)[2]) {
    const uint32_t seen_at = base + kSeen + kGroup * 8;
    const uint32_t seen[2] = {load_shared(seen_at), load_shared(seen_at + 4)};
    const bool all = (seen[0] & seen[1]) == ~0u;
    const float factor = load_shared_float(base + kFactors + row(0) * 4);
    const float other_factor = load_shared_float(base + kFactors + row(1) * 4);
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] *= i >> 1 & 1 ? other_factor : factor;
    if (!all) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const uint32_t column = (i / 4 % 4) * 8 + lane % 4 * 2 + i % 2;
        if (!(seen[i / 16] >> column & 1)) scores[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float found = -INFINITY;
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        found = fmaxf(found, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
      }
      found = fmaxf(found, __shfl_xor_sync(~0u, found, 1));
      found = fmaxf(found, __shfl_xor_sync(~0u, found, 2));
      rescale[r] = update_row_max(r, found > top[r] + kSlack ? found : top[r]);
      const float from = top[r] == -INFINITY ? 0.0f : top[r];
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
#pragma unroll
        for (int k = i + 2 * r; k < i + 2 * r + 2; ++k) {
          scores[k] = exp2_of(scores[k] - from);
          total[r] += scores[k];
        }
      }
    }
  }

  // Updates the row maximum and returns the factor of older sums.
  __device__ __forceinline__ float update_row_max(int r, float to) {
    float rescale = exp2_of(top[r] - to);
    if (top[r] == to) rescale = 1.0f;
    top[r] = to;
    total[r] *= rescale;
    return rescale;
  }

  __device__ __forceinline__ void rescale_out(const float (&rescale)[2]) {
    if (!__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < 128; ++i) out[i] *= rescale[i >> 1 & 1];
  }

  // Stores weights in the roped block of their tile, which all threads of the warpgroup have read.
  //
  // As an operand in registers they would not fit beside scores and sums.
  __device__ __forceinline__ void store_weights() {
    const int mine = unknown(lane);
    const uint32_t block = tile_at(base, kGroup) + kRopeBlock, to = warp * 16 + mine % 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = scores[k * 8 + i * 2], high = scores[k * 8 + i * 2 + 1];
        weights[i] = kFp8 ? pack_half(low, high) : pack_bfloat16(low, high);
      }
      store_matrices(block + swizzled(to, k * 2 + mine / 16), weights);
    }
    if (lane % 4 == 0) {
      store_shared(base + kRowMaxOffset + (kGroup * kHeads + row(0)) * 4, top[0]);
      store_shared(base + kRowMaxOffset + (kGroup * kHeads + row(1)) * 4, top[1]);
    }
    publish_to_async();
  }

  // Takes the row maximum of the other state.
  __device__ __forceinline__ void follow() {
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rescale[r] = update_row_max(
          r, load_shared_float(base + kRowMaxOffset + ((1 - kGroup) * kHeads + row(r)) * 4));
    }
    rescale_out(rescale);
  }

  // Adds the latents of a tile whose weights are in memory.
  template <int kBuffer>
  __device__ __forceinline__ void add() {
    const uint32_t tile = tile_at(base, kBuffer);
    const Operand weights = k_major(tile + kRopeBlock);
    const Operand latents = row_major(tile + kGroup * 4 * kBlock, kBlock);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_sums<!kFp8>(out, weights.at(k * 32), latents.at(k * 2048));
    wgmma_commit();
  }

  __device__ __forceinline__ void finish(int buffer) {
    wgmma_wait<0>();
    pin(out);
    warp_arrive(is_free(base, buffer, kGroup), lane);
  }
};

// Runs the warpgroup of even tiles. It scores and weighs a tile, publishes the weights and adds the
// tile, then adds the odd tile.
//
// Args:
//   uses: tiles that its buffer has held before.
template <bool kFp8, bool kRoped>
__device__ __forceinline__ void run(ComputeWarpgroup<kFp8, 0, kRoped>& state, int tiles,
                                    int uses = 0) {
  for (int t = 0; t < tiles; t += 2) {
    float rescale[2];
    state.score(uses + (t >> 1) & 1);
    state.weigh(rescale);
    named_barrier(kFirstBarrier, 128);
    state.store_weights();
    named_barrier_arrive(kFirstWeights, 256);
    named_barrier(kFirstBarrier, 128);
    state.rescale_out(rescale);
    state.template add<0>();
    state.finish(0);
    if (t + 1 < tiles) {
      named_barrier(kSecondWeights, 256);
      state.follow();
      state.template add<1>();
      state.finish(1);
    }
  }
}

// Runs the warpgroup of odd tiles. It adds the even tile's latents while the odd tile's scores
// become weights.
template <bool kFp8, bool kRoped>
__device__ __forceinline__ void run(ComputeWarpgroup<kFp8, 1, kRoped>& state, int tiles,
                                    int uses = 0) {
  for (int t = 0; t < tiles; t += 2) {
    const bool has_own = t + 1 < tiles;
    float rescale[2];
    named_barrier(kScored, 256);
    if (has_own) state.score(uses + (t >> 1) & 1);
    named_barrier(kFirstWeights, 256);
    state.follow();
    state.template add<0>();
    if (has_own) {
      state.weigh(rescale);
      state.store_weights();
      named_barrier_arrive(kSecondWeights, 256);
    }
    state.finish(0);
    if (has_own) {
      named_barrier(kSecondBarrier, 128);
      state.rescale_out(rescale);
      state.template add<1>();
      state.finish(1);
    }
  }
}

}  // namespace fd_dsa::wide
#endif  // FD_DSA_HOPPER
