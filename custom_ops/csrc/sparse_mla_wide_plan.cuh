// Sparse MLA for many heads: among how many blocks tokens are split, and in how many launches.
#ifndef FD_DSA_SPARSE_MLA_WIDE_PLAN_CUH
#define FD_DSA_SPARSE_MLA_WIDE_PLAN_CUH

#include <algorithm>

#include "sparse_mla_launch.cuh"
#include "sparse_mla_wide_shared.cuh"

namespace fd_dsa::wide {

using sparse_mla::kMostSplits;
using sparse_mla::Room;

// Among how many blocks a token and 64 heads may be split.
inline bool may_split(int splits) {
  return (splits > 0 && splits <= 8) || splits == kMostSplits;
}

// Tokens of one launch.
struct Part {
  int tokens, splits;
};

// A second launch where the first fills the device whole times, and what is left is split more.
struct Plan {
  Part first, rest;
};

// An estimate of a launch, in tiles, as measured on an H200: rounds of blocks on the device, times
// the tiles of a block and what it costs beside them.
inline float cost_of(Part part, int groups, int tiles, const Room& room) {
  constexpr float kStart = 4.0f, kCombine = 1.0f;
  const int64_t items = static_cast<int64_t>(part.tokens) * groups;
  const int64_t rounds = (items + room[part.splits] - 1) / room[part.splits];
  return rounds * ((tiles + part.splits - 1) / part.splits + kStart +
                   (part.splits > 1 ? kCombine : 0.0f));
}

// The cheapest single launch, and its cost.
inline Part cheapest(int tokens, int groups, int tiles, const Room& room, float& least) {
  Part best = {tokens, 1};
  least = cost_of(best, groups, tiles, room);
  for (int splits = 2; splits <= std::min(kMostSplits, tiles); ++splits) {
    if (!may_split(splits) || room[splits] <= 0) continue;
    const float cost = cost_of({tokens, splits}, groups, tiles, room);
    if (cost < least) least = cost, best.splits = splits;
  }
  return best;
}

// How the tokens of a step are launched; of their numbers alone, so that repeats give the same
// bits.
inline Plan plan_for(int tokens, int groups, int topk, const Room& room) {
  constexpr float kSecondLaunch = 3.0f;
  const int tiles = (topk + kKeys - 1) / kKeys;
  float least;
  Plan best = {cheapest(tokens, groups, tiles, room, least), {0, 0}};
  for (int splits = 1; splits <= std::max(1, std::min(kMostSplits, tiles)); ++splits) {
    if (!may_split(splits) || room[splits] < groups) continue;
    const int at_once = room[splits] / groups, left = tokens % at_once;
    if (left == 0 || left == tokens) continue;
    const Part first = {tokens - left, splits};
    float cost;
    const Part rest = cheapest(left, groups, tiles, room, cost);
    cost += cost_of(first, groups, tiles, room) + kSecondLaunch;
    if (cost < least) least = cost, best = {first, rest};
  }
  return best;
}

// A job for some of the tokens.
inline FdDsaSparseMla tokens_of(FdDsaSparseMla job, int first, int tokens) {
  const int64_t rows = static_cast<int64_t>(first) * job.num_heads;
  job.q = static_cast<const char*>(job.q) + rows * (2 * kWidth);
  job.slots += static_cast<int64_t>(first) * job.topk;
  job.out = static_cast<char*>(job.out) + rows * kRank * (job.out_is_bfloat16 != 0 ? 2 : 4);
  if (job.lse != nullptr) job.lse += rows;
  if (job.dequantized != nullptr) job.batch_id_per_token += first;
  job.num_tokens = tokens;
  return job;
}

}  // namespace fd_dsa::wide

#endif  // FD_DSA_SPARSE_MLA_WIDE_PLAN_CUH
