// Sparse MLA for many heads: what a block, or a cluster of them, writes.
#ifndef FD_DSA_SPARSE_MLA_WIDE_RESULTS_CUH
#define FD_DSA_SPARSE_MLA_WIDE_RESULTS_CUH

#include <cmath>

#include "sparse_mla_wide_heads.cuh"

#if defined(FD_DSA_HOPPER)
namespace fd_dsa::wide {

// What a block works on.
struct Place {
  int64_t token;
  int first_head, heads, rank;
};

__device__ __forceinline__ Place place_of(const FdDsaSparseMla& job, int splits) {
  const int groups = groups_of(job), item = blockIdx.x / splits;
  const int first_head = item % groups * kHeads;
  return {item / groups, first_head, min(job.num_heads - first_head, kHeads),
          static_cast<int>(blockIdx.x % splits)};
}

// Kept in memory over the loop over tiles, which has no registers for it.
__device__ __forceinline__ void keep_place(uint32_t base, const Place& place) {
  store_shared(base + kPlace, static_cast<int>(place.token));
  store_shared(base + kPlace + 4, place.first_head);
  store_shared(base + kPlace + 8, place.heads);
  store_shared(base + kPlace + 12, place.rank);
}

__device__ __forceinline__ Place kept_place(uint32_t base) {
  const auto kept = [&](int i) {
    return static_cast<int>(load_shared(base + kPlace + i * 4));
  };
  return {kept(0), kept(1), kept(2), kept(3)};
}

__device__ __forceinline__ void store_out(const FdDsaSparseMla& job, const Place& place,
                                          int row, int column, float4 x) {
  const int64_t at =
      ((place.token * job.num_heads + place.first_head + row) * kRank + column) / 4;
  if (job.out_is_bfloat16) {
    static_cast<uint2*>(job.out)[at] = {pack_bfloat16(x.x, x.y), pack_bfloat16(x.z, x.w)};
  } else {
    static_cast<float4*>(job.out)[at] = x;
  }
}

__device__ __forceinline__ void store_lse(const FdDsaSparseMla& job, const Place& place,
                                          int row, float top, float total) {
  if (job.lse == nullptr || row >= place.heads) return;
  job.lse[place.token * job.num_heads + place.first_head + row] =
      total == 0.0f ? -INFINITY : (top + log2f(total)) * kLn2;
}

// Sums of the weights of both warpgroups' tiles.
template <bool kFp8, int kGroup>
__device__ __forceinline__ void add_totals(Computing<kFp8, kGroup>& my) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float& total = my.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (my.lane % 4 == 0) {
      store_shared(my.base + kTotals + (kGroup * kHeads + my.row(r)) * 4, total);
    }
  }
  named_barrier_apart(kOfComputing, 256);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    my.total[r] = load_shared_float(my.base + kTotals + my.row(r) * 4) +
                  load_shared_float(my.base + kTotals + (kHeads + my.row(r)) * 4);
  }
}

// Writes the results of a block that has all of a token's entries: each warp has 16 heads, and half
// of their latents.
template <bool kFp8, int kGroup>
__device__ __forceinline__ void store_result(const FdDsaSparseMla& job, const Place& place,
                                             Computing<kFp8, kGroup>& my) {
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    factor[r] = my.total[r] == 0.0f ? 0.0f : 1.0f / my.total[r];
    if (kGroup == 0 && my.lane % 4 == 0) {
      store_lse(job, place, my.row(r), my.top[r], my.total[r]);
    }
  }
  const int64_t first = (place.token * job.num_heads + place.first_head) * kRank + kGroup * 256;
  if (job.out_is_bfloat16 != 0) {
    // rows go through shared memory, so that whole lines are written; `add_totals` has waited for
    // all that read tiles there
    constexpr uint32_t kRow = 512 + 16;
    const uint32_t rows = my.base + kTiles + (kGroup * 4 + my.warp) * (16 * kRow);
    const uint32_t to = rows + my.lane % 16 * kRow + my.lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = my.out + k * 8 + i * 2;
        pairs[i] = pack_bfloat16(x[0] * factor[i % 2], x[1] * factor[i % 2]);
      }
      store_matrices(to + k * 32, pairs);
    }
    publish_to_async();
    __syncwarp();
    const int row = my.warp * 16 + my.lane;
    if (my.lane < 16 && row < place.heads) {
      auto* out = static_cast<uint16_t*>(job.out) + first + row * kRank;
      store_bulk(out, rows + my.lane * kRow, 512);
      wait_for_bulk_stores();
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (my.row(r) >= place.heads) continue;
    float* out = static_cast<float*>(job.out) + first + my.row(r) * kRank + my.lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const float* x = my.out + j * 4 + r * 2;
      *reinterpret_cast<float2*>(out + j * 8) = make_float2(x[0] * factor[r], x[1] * factor[r]);
    }
  }
}

// Leaves a block's sums where it, and the other blocks of the cluster, can read them.
template <bool kFp8, int kGroup>
__device__ __forceinline__ void leave_share(const Computing<kFp8, kGroup>& my) {
  const uint32_t base = my.base;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t row =
        base + kTiles + (my.row(r) * kPartStride + kGroup * 256 + my.lane % 4 * 2) * 4;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      store_shared(row + j * 32, make_float2(my.out[j * 4 + r * 2], my.out[j * 4 + r * 2 + 1]));
    }
    // after the barrier of `add_totals`, so nobody reads a base or a total of a warpgroup any more
    if (kGroup == 0 && my.lane % 4 == 0) {
      store_shared(base + kTops + my.row(r) * 4, my.top[r]);
      store_shared(base + kShares + my.row(r) * 4, my.total[r]);
    }
  }
}

// Puts the shares of a cluster together: each block has some of the heads. 256 threads.
template <int kSplits>
__device__ __forceinline__ void combine(const FdDsaSparseMla& job, const Place& place,
                                        uint32_t base, int thread) {
  // rows of a block, and of a thread that are on their way at once
  constexpr int kRows = (kHeads + kSplits - 1) / kSplits, kTogether = kSplits < 8 ? 8 / kSplits : 1;
  const int first = place.rank * kRows, end = min(kRows, place.heads - first);
  if (thread < end) {
    const uint32_t at = base + (first + thread) * 4;
    float weight[kSplits], total[kSplits], highest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const uint32_t there = address_at_rank(at, split);
      weight[split] = load_cluster_float(there + kTops);
      total[split] = load_cluster_float(there + kShares);
    }
#pragma unroll
    for (int split = 0; split < kSplits; ++split) highest = fmaxf(highest, weight[split]);
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const float top = weight[split];
      weight[split] = top == -INFINITY ? 0.0f : exp2f(top - highest);
      sum += weight[split] * total[split];
    }
    store_lse(job, place, first + thread, highest, sum);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      store_shared(base + kTotals + (thread * kSplits + split) * 4, weight[split] * factor);
    }
  }
  named_barrier(kOfComputing, 256);
  // a thread has four columns of every other row
  const uint32_t from =
      base + kTiles + ((first + thread / 128) * kPartStride + thread % 128 * 4) * 4;
  for (int begin = thread / 128; begin < end; begin += 2 * kTogether) {
    float4 x[kTogether][kSplits];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const uint32_t row = from + (begin - thread / 128 + 2 * k) * (kPartStride * 4);
#pragma unroll
      for (int split = 0; split < kSplits; ++split) {
        if (begin + 2 * k < end) x[k][split] = load_cluster_float4(address_at_rank(row, split));
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int own = begin + 2 * k;
      if (own >= end) break;
      float4 sum = {0, 0, 0, 0};
#pragma unroll
      for (int split = 0; split < kSplits; ++split) {
        const float weight = load_shared_float(base + kTotals + (own * kSplits + split) * 4);
        const float4 y = x[k][split];
        sum.x += weight * y.x, sum.y += weight * y.y, sum.z += weight * y.z, sum.w += weight * y.w;
      }
      store_out(job, place, first + own, thread % 128 * 4, sum);
    }
  }
}

// The same for any number of blocks that there may be.
__device__ __forceinline__ void combine(const FdDsaSparseMla& job, const Place& place,
                                        uint32_t base, int splits, int thread) {
  switch (splits) {
    case 2: return combine<2>(job, place, base, thread);
    case 3: return combine<3>(job, place, base, thread);
    case 4: return combine<4>(job, place, base, thread);
    case 5: return combine<5>(job, place, base, thread);
    case 6: return combine<6>(job, place, base, thread);
    case 7: return combine<7>(job, place, base, thread);
    case 8: return combine<8>(job, place, base, thread);
    default: return combine<16>(job, place, base, thread);
  }
}

}  // namespace fd_dsa::wide
#endif

#endif  // FD_DSA_SPARSE_MLA_WIDE_RESULTS_CUH
