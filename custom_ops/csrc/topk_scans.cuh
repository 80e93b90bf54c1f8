// Top-k by passes over the row, digit by digit of the threshold.
//
// They serve plateaus of equal scores and candidates that do not fit.
#pragma once

#include "topk_row.cuh"

namespace fd_dsa::topk {

// The positions of a row that a block or one of its warps reads.
struct Span {
  int32_t begin, end;

  template <int kThreads>
  __device__ __forceinline__ Span of_warp() const {
    constexpr int kWarps = kThreads / kWarp;
    const int32_t length = max(0, end - begin);
    const int32_t each = (length + kWarps * kWarp - 1) / (kWarps * kWarp) * kWarp;
    const int32_t first = min(begin + warp_id() * each, end);
    return {first, min(first + each, end)};
  }
};

// Scores above and equal to a threshold before a warp, over all blocks of the cluster.
struct PrecedingCounts {
  uint32_t better, equal, all_better, all_equal;
};

// Adds one to a bin for each active lane. Lanes with the same bin as the first share one addition.
__device__ __forceinline__ void count_bin(uint32_t* bins, uint32_t bin, bool mine) {
  const unsigned active = __ballot_sync(kAllLanes, mine);
  if (active == 0) return;
  const int leader = __ffs(active) - 1;
  const uint32_t first = __shfl_sync(kAllLanes, bin, leader);
  const unsigned same = __ballot_sync(kAllLanes, mine && bin == first);
  if (lane_id() == leader) atomicAdd(&bins[first], static_cast<uint32_t>(__popc(same)));
  if (mine && bin != first) atomicAdd(&bins[bin], 1u);
}

// Sums the bins of all blocks into those of every block. `sums` is shared memory of rank 0.
template <int kThreads, typename Blocks>
__device__ void share_bins(Shared& shared, uint32_t* sums) {
  Blocks::sync();
  if (Blocks::rank() == 0) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) sums[i] = 0;
  }
  Blocks::sync();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    const uint32_t count = shared.bins[i];
    if (count != 0) Blocks::add(&sums[i], 0, count);
  }
  Blocks::sync();
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = Blocks::load(&sums[i], 0);
  __syncthreads();
}

// Returns the image of the k-th best score of a row with more than k scores.
//
// `need` becomes the number of chosen scores that equal it.
template <int kThreads, typename Blocks>
__device__ uint32_t find_image(const Row& row, Span span, uint32_t& need, Shared& shared,
                               uint32_t* sums) {
  uint32_t prefix = 0;
  const Span mine = span.of_warp<kThreads>();
  for (int decided = 0; decided < 32;) {
    const int width = min(kBinBits, 32 - decided), shift = 32 - decided - width;
    __syncthreads();
    for (int32_t at = mine.begin; at < mine.end; at += kWarp) {
      const int32_t position = at + lane_id();
      const bool inside = position < mine.end;
      const uint32_t image = inside ? image_of(__ldg(row.scores + position)) : 0;
      const bool counts = inside && (decided == 0 || image >> (32 - decided) == prefix);
      count_bin(shared.bins, image >> shift & ((1u << width) - 1), counts);
    }
    __syncthreads();
    share_bins<kThreads, Blocks>(shared, sums);
    find_bin<kThreads>(shared, need);
    need -= shared.above;
    prefix = prefix << width | shared.bin;
    decided += width;
  }
  return prefix;
}

// Counts a row's scores above and equal to a threshold.
template <int kThreads, typename Blocks>
__device__ PrecedingCounts count_scores(const Row& row, Span span, uint32_t threshold,
                                        Shared& shared) {
  uint32_t better = 0, equal = 0;
  const Span mine = span.of_warp<kThreads>();
  for (int32_t at = mine.begin; at < mine.end; at += kWarp) {
    const int32_t position = at + lane_id();
    const bool inside = position < mine.end;
    const uint32_t image = inside ? image_of(__ldg(row.scores + position)) : 0;
    better += inside && image > threshold;
    equal += inside && image == threshold;
  }
  better = __reduce_add_sync(kAllLanes, better);
  equal = __reduce_add_sync(kAllLanes, equal);
  if (lane_id() == 0) {
    shared.warp_low[warp_id()] = better;
    shared.warp_high[warp_id()] = equal;
  }
  __syncthreads();
  const bool lower = lane_id() < warp_id();
  const uint32_t better_below =
      __reduce_add_sync(kAllLanes, lower ? shared.warp_low[lane_id()] : 0);
  const uint32_t equal_below =
      __reduce_add_sync(kAllLanes, lower ? shared.warp_high[lane_id()] : 0);
  if (threadIdx.x == kThreads - kWarp) {
    for (uint32_t rank = 0; rank < Blocks::size(); ++rank) {
      Blocks::store(&shared.better_counts[Blocks::rank()], rank, better_below + better);
      Blocks::store(&shared.equal_counts[Blocks::rank()], rank, equal_below + equal);
    }
  }
  Blocks::sync();
  PrecedingCounts before = {better_below, equal_below, 0, 0};
  for (uint32_t rank = 0; rank < Blocks::size(); ++rank) {
    const uint32_t more = shared.better_counts[rank], same = shared.equal_counts[rank];
    if (rank < Blocks::rank()) {
      before.better += more;
      before.equal += same;
    }
    before.all_better += more;
    before.all_equal += same;
  }
  // the next count may overwrite
  Blocks::sync();
  return before;
}

// Writes the positions of the scores above a threshold and of the first `ties` scores equal to it.
template <int kThreads>
__device__ void write_scores(const Job& job, const Row& row, Span span, uint32_t threshold,
                             uint32_t ties, PrecedingCounts before) {
  const Span mine = span.of_warp<kThreads>();
  uint32_t at_entry = before.better + min(before.equal, ties);
  uint32_t equal_below = before.equal;
  int32_t* out = job.rows.out + row.token * job.rows.k;
  const uint32_t k = static_cast<uint32_t>(job.rows.k);
  for (int32_t at = mine.begin; at < mine.end && at_entry < k; at += kWarp) {
    const int32_t position = at + lane_id();
    const bool inside = position < mine.end;
    const uint32_t image = inside ? image_of(__ldg(row.scores + position)) : 0;
    const bool equal = inside && image == threshold;
    const unsigned equals = __ballot_sync(kAllLanes, equal);
    const uint32_t rank = equal_below + __popc(equals & lanes_below());
    const bool chosen = (inside && image > threshold) || (equal && rank < ties);
    const unsigned all = __ballot_sync(kAllLanes, chosen);
    if (chosen) out[at_entry + __popc(all & lanes_below())] = entry_at(job, row, position);
    at_entry += __popc(all);
    equal_below += __popc(equals);
  }
}

// Chooses by passes over a row with more than k scores. `hint` may be the k-th best score.
template <int kThreads, typename Blocks>
__device__ __noinline__ void choose_by_scans(const Job& job, Row row, Span span,
                                             bool has_hint, uint32_t hint, Shared& shared,
                                             uint32_t* sums) {
  uint32_t k = static_cast<uint32_t>(job.rows.k);
  if (has_hint) {
    const PrecedingCounts before = count_scores<kThreads, Blocks>(row, span, hint, shared);
    if (before.all_better < k && k <= before.all_better + before.all_equal) {
      write_scores<kThreads>(job, row, span, hint, k - before.all_better, before);
      return;
    }
  }
  const uint32_t threshold = find_image<kThreads, Blocks>(row, span, k, shared, sums);
  const PrecedingCounts before = count_scores<kThreads, Blocks>(row, span, threshold, shared);
  write_scores<kThreads>(job, row, span, threshold, k, before);
}

}  // namespace fd_dsa::topk
