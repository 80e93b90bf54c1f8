// Sparse MLA for many heads: the two warpgroups that compute.
#ifndef FD_DSA_SPARSE_MLA_WIDE_HEADS_CUH
#define FD_DSA_SPARSE_MLA_WIDE_HEADS_CUH

#include "sparse_mla_wide_shared.cuh"

#if defined(FD_DSA_HOPPER)
namespace fd_dsa::wide {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// A larger score moves the base of the exponentials if it is so much larger, in powers of two;
// weights then stay below 2^8, which float16 and bfloat16 hold as well as those below 1.
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

// Eight bfloat16 values times a power of two; as float16, or still bfloat16.
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

// Writes the queries of a block as an operand, and what each head's scores are to be multiplied
// with. For FP8 records latents are float16, and queries are brought into its range by a power of
// two a head, which leaves the roped values bfloat16.
template <bool kFp8>
__device__ __forceinline__ void put_queries(const FdDsaSparseMla& job, int64_t token,
                                            int first_head, uint32_t base, int warp, int lane) {
  constexpr int kEach = 8;  // of a warp: all are asked for before one is waited for
  uint4 x[kEach][3];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int head = first_head + warp * kEach + i;
    const bool is_head = head < job.num_heads;
    const uint4* row = static_cast<const uint4*>(job.q) +
                       (token * job.num_heads + (is_head ? head : 0)) * (kWidth / 8) + lane;
    const uint4 zero = {0, 0, 0, 0};
    x[i][0] = is_head ? __ldg(row) : zero;
    x[i][1] = is_head ? __ldg(row + 32) : zero;
    x[i][2] = is_head && lane < 8 ? __ldg(row + 64) : zero;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = warp * kEach + i;
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

// Computes even tiles' weights (kGroup 0) or odd ones', and the sum of half of all latents. A
// thread has two rows, 8 apart, and in each block of 8 columns two neighbouring ones.
template <bool kFp8, int kGroup>
struct Computing {
  uint32_t base;
  int warp, lane;  // of the warpgroup
  float out[128], scores[32];
  float top[2], total[2];  // a row

  __device__ __forceinline__ Computing(uint32_t base, int warp, int lane)
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

  // Products of the queries with a tile.
  __device__ __forceinline__ void score(int parity) {
    const uint32_t tile = tile_at(base, kGroup);
    barrier_wait(there(base, kGroup, 0), parity);
    // here and not where tiles are brought, where it would wait for all that is on its way
    publish_to_async();
    wgmma_fence();
    add_scores<0, 16>(tile);
    barrier_wait(there(base, kGroup, 1), parity);
    publish_to_async();
    add_scores<16, 32>(tile);
    add_scores<32, 36>(tile);
    if constexpr (kGroup == 0) {
      // the other warpgroup's turn: it has the tensor cores while this one makes weights
      wgmma_wait<1>();
      named_barrier_arrive(kScored, 256);
    }
    wgmma_wait<0>();
    pin(scores);
  }

  // Turns scores into weights; `shrink` is what older sums are to be multiplied with.
  __device__ __forceinline__ void weigh(float (&shrink)[2]) {
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
      shrink[r] = move_base(r, found > top[r] + kSlack ? found : top[r]);
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

  // Takes another base of the exponentials.
  __device__ __forceinline__ float move_base(int r, float to) {
    float shrink = exp2_of(top[r] - to);
    if (top[r] == to) shrink = 1.0f;
    top[r] = to;
    total[r] *= shrink;
    return shrink;
  }

  __device__ __forceinline__ void shrink_out(const float (&shrink)[2]) {
    if (!__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < 128; ++i) out[i] *= shrink[i >> 1 & 1];
  }

  // Puts weights in the roped block of their tile, which all threads of the warpgroup have read. As
  // an operand from registers they would not find room beside scores and sums.
  __device__ __forceinline__ void put_weights() {
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
      store_shared(base + kTops + (kGroup * kHeads + row(0)) * 4, top[0]);
      store_shared(base + kTops + (kGroup * kHeads + row(1)) * 4, top[1]);
    }
    publish_to_async();
  }

  // The base that the other warpgroup took.
  __device__ __forceinline__ void follow() {
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shrink[r] = move_base(r, load_shared_float(base + kTops + ((1 - kGroup) * kHeads + row(r)) * 4));
    }
    shrink_out(shrink);
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

// Even tiles: score, weigh, tell the other warpgroup; add; add what the other one weighed.
template <bool kFp8>
__device__ __forceinline__ void run(Computing<kFp8, 0>& my, int tiles) {
  for (int t = 0; t < tiles; t += 2) {
    float shrink[2];
    my.score(t >> 1 & 1);
    my.weigh(shrink);
    named_barrier(kOfFirst, 128);
    my.put_weights();
    named_barrier_arrive(kFirstWeights, 256);
    named_barrier(kOfFirst, 128);
    my.shrink_out(shrink);
    my.template add<0>();
    my.finish(0);
    if (t + 1 < tiles) {
      named_barrier(kSecondWeights, 256);
      my.follow();
      my.template add<1>();
      my.finish(1);
    }
  }
}

// Odd tiles: the even tile's latents are added while the odd one's scores become weights.
template <bool kFp8>
__device__ __forceinline__ void run(Computing<kFp8, 1>& my, int tiles) {
  for (int t = 0; t < tiles; t += 2) {
    const bool has_own = t + 1 < tiles;
    float shrink[2];
    named_barrier(kScored, 256);
    if (has_own) my.score(t >> 1 & 1);
    named_barrier(kFirstWeights, 256);
    my.follow();
    my.template add<0>();
    if (has_own) {
      my.weigh(shrink);
      my.put_weights();
      named_barrier_arrive(kSecondWeights, 256);
    }
    my.finish(0);
    if (has_own) {
      named_barrier(kOfSecond, 128);
      my.shrink_out(shrink);
      my.template add<1>();
      my.finish(1);
    }
  }
}

}  // namespace fd_dsa::wide
#endif

#endif  // FD_DSA_SPARSE_MLA_WIDE_HEADS_CUH
