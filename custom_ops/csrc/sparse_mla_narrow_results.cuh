// Sparse MLA for few heads: what warpgroups and blocks have of a token, put together and written.
#ifndef FD_DSA_SPARSE_MLA_NARROW_RESULTS_CUH
#define FD_DSA_SPARSE_MLA_NARROW_RESULTS_CUH

#include "sparse_mla_narrow_tile.cuh"

namespace fd_dsa::narrow {

#if defined(FD_DSA_HOPPER)

__device__ __forceinline__ void store_out(const FdDsaSparseMla& job, int64_t at, float4 x) {
  if (job.out_is_bfloat16 != 0) {
    __stcs(reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(job.out) + at),
           make_uint2(pack_bfloat16(x.x, x.y), pack_bfloat16(x.z, x.w)));
  } else {
    __stcs(reinterpret_cast<float4*>(static_cast<float*>(job.out) + at), x);
  }
}

__device__ __forceinline__ float lse_of(float top, float total) {
  return total == 0.0f ? -INFINITY : (top + log2f(total)) * 0.6931471805599453f;
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Behind what both warpgroups stored, before either reads what the other did. One barrier orders
// them; racecheck does not see that for some first reads behind one, and does behind two.
__device__ __forceinline__ void exchange_barrier() {
  named_barrier_apart(kOfBoth, 256);
  named_barrier_apart(kOfBothNext, 256);
}

// Puts top and sum of each head where all warps of the group, and of the cluster, find them.
template <int kHeads, Form kForm>
__device__ __forceinline__ void put_stats(const State<kHeads>& state, uint32_t base, int group,
                                          int warp, int lane) {
  using Shape = Layout<kHeads, kForm>;
  constexpr int kMine = kHeads / 4;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const float total = sum_of_warp(state.total[i]);
    if (lane == 0) {
      store_shared(base + Shape::kStats + (group * kHeads + warp * kMine + i) * 8,
                   make_float2(state.top[i], total));
    }
  }
  named_barrier(kOfFirst + group, 128);
}

// Calls `put(head of the group, latent, 4 sums)` for all that a thread has.
template <int kHeads, typename Put>
__device__ __forceinline__ void for_each_sum(const State<kHeads>& state, int warp, int lane,
                                             Put put) {
  const float unit = __uint_as_float(min(state.exponent, 253u) << 23);
#pragma unroll
  for (int j = 0; j < kHeads / 8; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&x)[4] = state.out[2 * i][j];
        const float(&y)[4] = state.out[2 * i + 1][j];
        put(8 * j + 2 * (lane & 3) + k, warp * 128 + lane / 4 * 16 + i * 4,
            make_float4(x[k] * unit, x[k + 2] * unit, y[k] * unit, y[k + 2] * unit));
      }
    }
  }
}

// Writes the result of a warpgroup that has all keys of its heads.
template <int kHeads, Form kForm>
__device__ __forceinline__ void store_results(const FdDsaSparseMla& job, int64_t token,
                                              const State<kHeads>& state, uint32_t base, int group,
                                              int warp, int lane) {
  using Shape = Layout<kHeads, kForm>;
  const uint32_t stats = base + Shape::kStats + group * (kHeads * 8);
  for_each_sum<kHeads>(state, warp, lane, [&](int head, int latent, float4 x) {
    const int64_t row = token * job.num_heads + head;
    if (head >= job.num_heads) return;
    const float total = load_shared_float2(stats + head * 8).y;
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
    store_out(job, row * kRank + latent,
              make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor));
  });
  const int head = warp * 32 + lane;
  if (head < job.num_heads && job.lse != nullptr) {
    const float2 x = load_shared_float2(stats + head * 8);
    job.lse[token * job.num_heads + head] = lse_of(x.x, x.y);
  }
}

// Leaves the sums of a warpgroup where those who add them up find them.
template <int kHeads, Form kForm>
__device__ __forceinline__ void put_part(const State<kHeads>& state, uint32_t base, int group,
                                         int warp, int lane) {
  using Shape = Layout<kHeads, kForm>;
  // the ring is read to its end by all who write there
  if (Shape::kGroups > 1) named_barrier(kOfBothNext, 256);
  const uint32_t part = base + Shape::kRing + group * Shape::kPartBytes;
  for_each_sum<kHeads>(state, warp, lane, [&](int head, int latent, float4 x) {
    store_shared(part + (head * kPartStride + latent) * 4, x);
  });
}

// Adds up what both warpgroups have, in a block that has all of a token.
template <int kHeads, Form kForm>
__device__ __forceinline__ void combine_own(const FdDsaSparseMla& job, int64_t token,
                                            uint32_t base) {
  using Shape = Layout<kHeads, kForm>;
  const uint32_t work = static_cast<uint32_t>(job.num_heads) * (kRank / 4);
#pragma unroll 2
  for (uint32_t i = threadIdx.x; i < work; i += 256) {
    const uint32_t head = i / (kRank / 4), column = i % (kRank / 4) * 4;
    const uint32_t at = base + Shape::kRing + (head * kPartStride + column) * 4;
    const float2 a = load_shared_float2(base + Shape::kStats + head * 8);
    const float2 b = load_shared_float2(base + Shape::kStats + (kHeads + head) * 8);
    const float4 x = load_shared_float4(at), y = load_shared_float4(at + Shape::kPartBytes);
    const float top = fmaxf(a.x, b.x), from = top == -INFINITY ? 0.0f : top;
    float mine = exp2_of(a.x - from), other = exp2_of(b.x - from);
    const float total = fmaf(b.y, other, a.y * mine);
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
    const int64_t row = token * job.num_heads + head;
    if (column == 0 && job.lse != nullptr) job.lse[row] = lse_of(top, total);
    mine *= factor, other *= factor;
    store_out(job, row * kRank + column,
              make_float4(fmaf(y.x, other, x.x * mine), fmaf(y.y, other, x.y * mine),
                          fmaf(y.z, other, x.z * mine), fmaf(y.w, other, x.w * mine)));
  }
}

// Adds up what warpgroups of all blocks of a token have: a block does some of the numbers.
template <int kHeads, Form kForm>
__device__ __forceinline__ void combine(const FdDsaSparseMla& job, int64_t token, uint32_t base,
                                        uint32_t rank, uint32_t blocks) {
  using Shape = Layout<kHeads, kForm>;
  constexpr uint32_t kThreads = Shape::kGroups * 128;
  constexpr int kParts = Shape::kParts, kAtOnce = 4 / kParts;
  // what others read is there
  __syncwarp();
  cluster_sync();
  const uint32_t work = static_cast<uint32_t>(job.num_heads) * (kRank / 4);
  for (uint32_t i = rank * kThreads + threadIdx.x; i < work; i += blocks * kThreads) {
    const uint32_t head = i / (kRank / 4), column = i % (kRank / 4) * 4;
    float top = -INFINITY, total = 0.0f;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (uint32_t first = 0; first < blocks; first += kAtOnce) {
      float2 stats[kAtOnce][kParts];
      float4 x[kAtOnce][kParts];
      float now = top;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        // past the last block: the first one again, which then counts nothing
        const uint32_t there = address_at_rank(base, first + r < blocks ? first + r : 0);
#pragma unroll
        for (int w = 0; w < kParts; ++w) {
          stats[r][w] = load_cluster_float2(there + Shape::kStats +
                                            (w * kHeads + head) * 8);
          x[r][w] = load_cluster_float4(there + Shape::kRing + w * Shape::kPartBytes +
                                        (head * kPartStride + column) * 4);
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
        for (int w = 0; w < kParts; ++w) {
          if (first + r >= blocks) stats[r][w].x = -INFINITY;
          now = fmaxf(now, stats[r][w].x);
        }
      }
      const float from = now == -INFINITY ? 0.0f : now, less = exp2_of(top - from);
      total *= less;
      sum = make_float4(sum.x * less, sum.y * less, sum.z * less, sum.w * less);
      top = now;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
        for (int w = 0; w < kParts; ++w) {
          const float share = exp2_of(stats[r][w].x - from);
          total = fmaf(stats[r][w].y, share, total);
          sum = make_float4(fmaf(x[r][w].x, share, sum.x), fmaf(x[r][w].y, share, sum.y),
                            fmaf(x[r][w].z, share, sum.z), fmaf(x[r][w].w, share, sum.w));
        }
      }
    }
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
    const int64_t row = token * job.num_heads + head;
    store_out(job, row * kRank + column,
              make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor));
    if (column == 0 && job.lse != nullptr) job.lse[row] = lse_of(top, total);
  }
  // nobody goes while others read here
  __syncwarp();
  cluster_sync();
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_RESULTS_CUH
