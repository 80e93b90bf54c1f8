// Sparse MLA for 9 to 32 heads: warpgroups put together what they have of a token.
#ifndef FD_DSA_SPARSE_MLA_NARROW_EXCHANGE_CUH
#define FD_DSA_SPARSE_MLA_NARROW_EXCHANGE_CUH

#include "sparse_mla_narrow_products.cuh"
#include "sparse_mla_narrow_results.cuh"

namespace fd_dsa::narrow {

#if defined(FD_DSA_HOPPER)

// Leaves tops and totals of a warpgroup where the others find them, once all are done with tiles,
// queries and weights.
template <typename Shape>
__device__ __forceinline__ void put_stats(const Sums<Shape::kHeads>& my, uint32_t base, int group,
                                          int warp, int lane) {
  constexpr int kHeads = Shape::kHeads, kMine = kHeads / 4;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int at = group * kHeads + warp * kMine + i;
    const float total = sum_of_warp(my.total[i]);
    const float top = __uint_as_float(load_shared(base + Shape::kTops + at * 4));
    if (lane == 0) store_shared(base + Shape::kOwnStats + at * 8, make_float2(top, total));
  }
  named_barrier(kOfAllNext, Shape::kGroups * 128);
}

// How much what each warpgroup has of a head counts.
template <int kGroups>
struct Shares {
  float of[kGroups];
};

// Where one warpgroup leaves half of its heads for another, 0 or 1, which adds them up.
template <typename Shape>
__device__ __forceinline__ uint32_t gift(uint32_t base, int from, int to) {
  const int number = from < 2 ? from : from * 2 - 2 + to;
  return base + Shape::kExchange + number * Shape::kGiftBytes;
}

// Leaves the heads of another warpgroup; `back` takes the units off again.
template <int kHeads, int kTo>
__device__ __forceinline__ void give(const Sums<kHeads>& my, const float (&back)[4], uint32_t to) {
  constexpr int kHalf = kHeads / 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const float* x = my.out[i] + 4 * (kTo * kHalf + j);
      const float by = back[i / 2];
      store_shared(to + (i * kHalf + j) * 2048,
                   make_float4(x[0] * by, x[1] * by, x[2] * by, x[3] * by));
    }
  }
}

// Adds up what all warpgroups have of half of the heads. `share(head, stats)` makes shares of tops
// and totals; `put(head, latent, sums)` takes two neighbouring latents.
template <typename Shape, int kGroup, typename Share, typename Put>
__device__ __forceinline__ void take(const Sums<Shape::kHeads>& my, const float (&back)[4],
                                     uint32_t base, int warp, int lane, Share share, Put put) {
  constexpr int kHeads = Shape::kHeads, kHalf = kHeads / 16, kGroups = Shape::kGroups;
  const uint32_t place = base + (warp * 32 + lane) * 16;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const int head = 8 * (kGroup * kHalf + j) + 2 * (lane & 3);
    Shares<kGroups> shares[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float2 stats[kGroups];
#pragma unroll
      for (int w = 0; w < kGroups; ++w) {
        stats[w] = load_shared_float2(base + Shape::kOwnStats + (w * kHeads + head + k) * 8);
      }
      shares[k] = share(head + k, stats);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float* x = my.out[i] + 4 * (kGroup * kHalf + j);
      const int latent = i / 2 * 128 + warp * 32 + i % 2 * 16 + lane / 4 * 2;
      const float first = shares[0].of[kGroup] * back[i / 2];
      const float second = shares[1].of[kGroup] * back[i / 2];
      float4 sum = make_float4(x[0] * first, x[1] * second, x[2] * first, x[3] * second);
#pragma unroll
      for (int w = 0; w < kGroups; ++w) {
        if (w == kGroup) continue;
        const float4 y =
            load_shared_float4(gift<Shape>(place, w, kGroup) + (i * kHalf + j) * 2048);
        const float even = shares[0].of[w], odd = shares[1].of[w];
        sum = make_float4(fmaf(y.x, even, sum.x), fmaf(y.y, odd, sum.y), fmaf(y.z, even, sum.z),
                          fmaf(y.w, odd, sum.w));
      }
      put(head, latent, make_float2(sum.x, sum.z));
      put(head + 1, latent, make_float2(sum.y, sum.w));
    }
  }
}

// The first two warpgroups get half of the heads each, in registers as their own; see `take`.
template <typename Shape, int kGroup, typename Share, typename Put>
__device__ __forceinline__ void exchange(const Sums<Shape::kHeads>& my, uint32_t base, int warp,
                                         int lane, Share share, Put put) {
  constexpr int kHeads = Shape::kHeads;
  const uint32_t place = base + (warp * 32 + lane) * 16;
  float back[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    back[i] = __uint_as_float((254u << 23) - __float_as_uint(my.unit[i]));
  }
  if constexpr (kGroup != 0) give<kHeads, 0>(my, back, gift<Shape>(place, kGroup, 0));
  if constexpr (kGroup != 1) give<kHeads, 1>(my, back, gift<Shape>(place, kGroup, 1));
  exchange_barrier<Shape>();
  if constexpr (kGroup < 2) take<Shape, kGroup>(my, back, base, warp, lane, share, put);
}

// Writes the result of a block that has all of a token, or leaves its part of it where the cluster
// finds it.
template <typename Shape, int kGroup>
__device__ __forceinline__ void finish(const FdDsaSparseMla& job, int64_t token,
                                       const Sums<Shape::kHeads>& my, uint32_t base, bool is_alone,
                                       int warp, int lane) {
  constexpr int kGroups = Shape::kGroups;
  const int64_t row = token * job.num_heads;
  const auto share = [&](int head, const float2(&stats)[kGroups]) {
    float top = stats[0].x, total = 0.0f;
    Shares<kGroups> shares;
#pragma unroll
    for (int w = 1; w < kGroups; ++w) top = fmaxf(top, stats[w].x);
    const float from = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < kGroups; ++w) {
      shares.of[w] = exp2_of(stats[w].x - from);
      total = fmaf(stats[w].y, shares.of[w], total);
    }
    const bool tells = warp == 0 && lane < 4;
    if (!is_alone) {
      if (tells) store_shared(base + Shape::kStats + head * 8, make_float2(top, total));
      return shares;
    }
    if (tells && head < job.num_heads && job.lse != nullptr) {
      job.lse[row + head] = lse_of(top, total);
    }
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
#pragma unroll
    for (int w = 0; w < kGroups; ++w) shares.of[w] *= factor;
    return shares;
  };
  if (!is_alone) {
    exchange<Shape, kGroup>(my, base, warp, lane, share, [&](int head, int latent, float2 x) {
      store_shared(base + Shape::kRing + (head * kPartStride + latent) * 4, x);
    });
  } else if (job.out_is_bfloat16 != 0) {
    auto* out = static_cast<__nv_bfloat16*>(job.out) + row * kRank;
    exchange<Shape, kGroup>(my, base, warp, lane, share, [&](int head, int latent, float2 x) {
      if (head >= job.num_heads) return;
      __stcs(reinterpret_cast<uint32_t*>(out + head * kRank + latent), pack_bfloat16(x.x, x.y));
    });
  } else {
    auto* out = static_cast<float*>(job.out) + row * kRank;
    exchange<Shape, kGroup>(my, base, warp, lane, share, [&](int head, int latent, float2 x) {
      if (head >= job.num_heads) return;
      __stcs(reinterpret_cast<float2*>(out + head * kRank + latent), x);
    });
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_EXCHANGE_CUH
