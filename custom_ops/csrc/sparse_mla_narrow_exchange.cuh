// Sparse MLA for 9 to 32 heads: two warpgroups put together what they have of a token.
#ifndef FD_DSA_SPARSE_MLA_NARROW_EXCHANGE_CUH
#define FD_DSA_SPARSE_MLA_NARROW_EXCHANGE_CUH

#include "sparse_mla_narrow_products.cuh"
#include "sparse_mla_narrow_results.cuh"

namespace fd_dsa::narrow {

#if defined(FD_DSA_HOPPER)

// Leaves tops and totals of a warpgroup where the other finds them, once both are done with tiles,
// queries and weights.
template <int kHeads>
__device__ __forceinline__ void put_stats(const Sums<kHeads>& my, uint32_t base, int group,
                                          int warp, int lane) {
  using Shape = Layout<kHeads, Form::kWarpgroups>;
  constexpr int kMine = kHeads / 4;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int at = group * kHeads + warp * kMine + i;
    const float total = sum_of_warp(my.total[i]);
    const float top = __uint_as_float(load_shared(base + Shape::kTops + at * 4));
    if (lane == 0) store_shared(base + Shape::kOwnStats + at * 8, make_float2(top, total));
  }
  named_barrier(kOfBothNext, 256);
}

// How much what this warpgroup and the other have of a head counts.
struct Shares {
  float mine, other;
};

// Adds up what both warpgroups have of a token: each gets half of the other's heads, in registers
// as its own. `share(head, own, other)` makes shares of tops and totals; `put(head, latent, sums)`
// takes two neighbouring latents.
template <int kHeads, int kGroup, typename Share, typename Put>
__device__ __forceinline__ void exchange(const Sums<kHeads>& my, uint32_t base, int warp, int lane,
                                         Share share, Put put) {
  using Shape = Layout<kHeads, Form::kWarpgroups>;
  constexpr int kHalf = kHeads / 16, kOwn = kGroup * kHalf, kOther = kHalf - kOwn;
  constexpr uint32_t kBytes = 8 * kHalf * 128 * 16;
  const uint32_t place = base + Shape::kExchange + (warp * 32 + lane) * 16;
  // takes the units off again
  float back[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    back[i] = __uint_as_float((254u << 23) - __float_as_uint(my.unit[i]));
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const float* x = my.out[i] + 4 * (kOther + j);
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
      const float* x = my.out[i] + 4 * (kOwn + j);
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

// Writes the result of a block that has all of a token, or leaves its part of it where the cluster
// finds it.
template <int kHeads, int kGroup>
__device__ __forceinline__ void finish(const FdDsaSparseMla& job, int64_t token,
                                       const Sums<kHeads>& my, uint32_t base, bool is_alone,
                                       int warp, int lane) {
  using Shape = Layout<kHeads, Form::kWarpgroups>;
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
    exchange<kHeads, kGroup>(my, base, warp, lane, share, [&](int head, int latent, float2 x) {
      store_shared(base + Shape::kRing + (head * kPartStride + latent) * 4, x);
    });
  } else if (job.out_is_bfloat16 != 0) {
    auto* out = static_cast<__nv_bfloat16*>(job.out) + row * kRank;
    exchange<kHeads, kGroup>(my, base, warp, lane, share, [&](int head, int latent, float2 x) {
      if (head >= job.num_heads) return;
      __stcs(reinterpret_cast<uint32_t*>(out + head * kRank + latent), pack_bfloat16(x.x, x.y));
    });
  } else {
    auto* out = static_cast<float*>(job.out) + row * kRank;
    exchange<kHeads, kGroup>(my, base, warp, lane, share, [&](int head, int latent, float2 x) {
      if (head >= job.num_heads) return;
      __stcs(reinterpret_cast<float2*>(out + head * kRank + latent), x);
    });
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_EXCHANGE_CUH
