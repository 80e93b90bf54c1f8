// Sparse MLA for blocks of 64 heads: the work of a block, and its results.
#pragma once

#include "sparse_mla_wide_compute.cuh"

#if defined(FD_DSA_HOPPER)
namespace fd_dsa::wide {

// The work of a block.
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

// Keeps the place in shared memory during the loop over tiles, which has no registers for it.
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

// Sums the weights of both warpgroups' tiles.
template <bool kFp8, int kGroup, bool kRoped>
__device__ __forceinline__ void add_totals(ComputeWarpgroup<kFp8, kGroup, kRoped>& state) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float& total = state.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (state.lane % 4 == 0) {
      store_shared(state.base + kTotals + (kGroup * kHeads + state.row(r)) * 4, total);
    }
  }
  named_barrier_apart(kComputeBarrier, 256);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    state.total[r] = load_shared_float(state.base + kTotals + state.row(r) * 4) +
                     load_shared_float(state.base + kTotals + (kHeads + state.row(r)) * 4);
  }
}

// Writes the results of a block that has all entries of a token.
//
// Each warp has 16 heads and half of their latents.
template <bool kFp8, int kGroup>
__device__ __forceinline__ void store_result(const FdDsaSparseMla& job, const Place& place,
                                             ComputeWarpgroup<kFp8, kGroup>& state) {
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    factor[r] = state.total[r] == 0.0f ? 0.0f : 1.0f / state.total[r];
    if (kGroup == 0 && state.lane % 4 == 0) {
      store_lse(job, place, state.row(r), state.top[r], state.total[r]);
    }
  }
  const int64_t first = (place.token * job.num_heads + place.first_head) * kRank + kGroup * 256;
  if (job.out_is_bfloat16 != 0) {
    // Rows go through shared memory, so that whole lines are written. `add_totals` has waited for
    // all reads of tiles there.
    constexpr uint32_t kRow = 512 + 16;
    const uint32_t rows = state.base + kTiles + (kGroup * 4 + state.warp) * (16 * kRow);
    const uint32_t to = rows + state.lane % 16 * kRow + state.lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = state.out + k * 8 + i * 2;
        pairs[i] = pack_bfloat16(x[0] * factor[i % 2], x[1] * factor[i % 2]);
      }
      store_matrices(to + k * 32, pairs);
    }
    publish_to_async();
    __syncwarp();
    const int row = state.warp * 16 + state.lane;
    if (state.lane < 16 && row < place.heads) {
      auto* out = static_cast<uint16_t*>(job.out) + first + row * kRank;
      store_bulk(out, rows + state.lane * kRow, 512);
      wait_for_bulk_stores();
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (state.row(r) >= place.heads) continue;
    float* out = static_cast<float*>(job.out) + first + state.row(r) * kRank + state.lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const float* x = state.out + j * 4 + r * 2;
      *reinterpret_cast<float2*>(out + j * 8) = make_float2(x[0] * factor[r], x[1] * factor[r]);
    }
  }
}

// Stores a block's sums for all blocks of the cluster.
template <bool kFp8, int kGroup>
__device__ __forceinline__ void store_partial(const ComputeWarpgroup<kFp8, kGroup>& state) {
  const uint32_t base = state.base;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t row =
        base + kTiles + (state.row(r) * kPartStride + kGroup * 256 + state.lane % 4 * 2) * 4;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      store_shared(row + j * 32,
                   make_float2(state.out[j * 4 + r * 2], state.out[j * 4 + r * 2 + 1]));
    }
    // after the barrier of `add_totals`, so the row maxima and totals of the warpgroups are read
    // already
    if (kGroup == 0 && state.lane % 4 == 0) {
      store_shared(base + kRowMaxOffset + state.row(r) * 4, state.top[r]);
      store_shared(base + kShares + state.row(r) * 4, state.total[r]);
    }
  }
}

// Adds up the partial results of a cluster. Each block adds some of the heads; 256 threads call it.
template <int kSplits>
__device__ __forceinline__ void combine(const FdDsaSparseMla& job, const Place& place,
                                        uint32_t base, int thread) {
  // rows of a block, and rows that a thread loads at the same time
  constexpr int kRows = (kHeads + kSplits - 1) / kSplits, kAtOnce = kSplits < 8 ? 8 / kSplits : 1;
  const int first = place.rank * kRows, end = min(kRows, place.heads - first);
  if (thread < end) {
    const uint32_t at = base + (first + thread) * 4;
    float weight[kSplits], total[kSplits], highest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const uint32_t peer = address_at_rank(at, split);
      weight[split] = load_cluster_float(peer + kRowMaxOffset);
      total[split] = load_cluster_float(peer + kShares);
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
  named_barrier(kComputeBarrier, 256);
  // a thread has four columns of every other row
  const uint32_t from =
      base + kTiles + ((first + thread / 128) * kPartStride + thread % 128 * 4) * 4;
  for (int begin = thread / 128; begin < end; begin += 2 * kAtOnce) {
    float4 x[kAtOnce][kSplits];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const uint32_t row = from + (begin - thread / 128 + 2 * k) * (kPartStride * 4);
#pragma unroll
      for (int split = 0; split < kSplits; ++split) {
        if (begin + 2 * k < end) x[k][split] = load_cluster_float4(address_at_rank(row, split));
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
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

// Adds up the partial results of a cluster of any allowed size.
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
#endif  // FD_DSA_HOPPER
