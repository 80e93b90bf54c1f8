// The kernels of sparse MLA on the emulated GPU, and what their launchers decide.
#include "wgmma.cuh"
// the other comes first, so that its guard keeps the hardware's own out
#include "sparse_mla_narrow.cu"
#include "sparse_mla_wide.cu"

// Among how many blocks the launcher splits a token, with room for `clusters` / n clusters of n.
extern "C" int sparse_mla_splits(int num_tokens, int topk, int clusters) {
  fd_dsa::narrow::Room room = {};
  for (int n = 1; n <= fd_dsa::narrow::kMaxSplits; ++n) room[n] = clusters / n;
  return fd_dsa::narrow::splits_for(num_tokens, topk, room);
}

// In two launches: the first `tokens`, and the others, each with their splits.
extern "C" int sparse_mla_wide_in_two(const FdDsaSparseMla* job, int tokens, int splits,
                                      int of_others) {
  using namespace fd_dsa::wide;
  const Plan plan = {{tokens, splits}, {job->num_tokens - tokens, of_others}};
  if (job->is_fp8 == 0) return launch_plan<Source::kBfloat16>(*job, plan, nullptr);
  return job->dequantized == nullptr ? launch_plan<Source::kRecords>(*job, plan, nullptr)
                                     : launch_plan<Source::kDequantized>(*job, plan, nullptr);
}

// [first tokens, splits, other tokens, splits] of a launch, with room for `blocks` blocks at once.
extern "C" void sparse_mla_wide_plan(int num_tokens, int groups, int topk, int blocks, int* found) {
  fd_dsa::wide::Room room = {};
  for (int n = 1; n <= fd_dsa::wide::kMaxSplits; ++n) room[n] = blocks / n;
  const auto [first, rest] = fd_dsa::wide::plan_for(num_tokens, groups, topk, room);
  for (int x : {first.tokens, first.splits, rest.tokens, rest.splits}) *found++ = x;
}
