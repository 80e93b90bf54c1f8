// The kernels of sparse MLA on the emulated GPU, that for few heads in a form of the caller's choice.
#include "hopper.cuh"
// the others come first, so that their guards keep the hardware's own out
#include "sparse_mla_values.cuh"
#include "wgmma_rows.cuh"
#include "wgmma_wide.cuh"

#include "sparse_mla_narrow.cuh"
#include "sparse_mla_wide.cuh"

using fd_dsa::narrow::Form;

// `form` 0 to 2: as the launcher has them; -1: its choice.
extern "C" int sparse_mla_emulated(const FdDsaSparseMla* job, int form) {
  using namespace fd_dsa::narrow;
  if (form == 0) return launch_form<Form::kOne>(*job, nullptr);
  if (form == 1) return launch_form<Form::kTakeTurns>(*job, nullptr);
  if (form == 2) {
    return job->num_heads > 16 ? launch_warpgroups<32>(*job, nullptr)
                               : launch_warpgroups<16>(*job, nullptr);
  }
  return launch_narrow(*job, nullptr);
}

extern "C" int sparse_mla_wide_emulated(const FdDsaSparseMla* job) {
  return fd_dsa::wide::launch_wide(*job, nullptr);
}

// Among how many blocks the launcher splits a token, with room for `clusters` / n clusters of n.
extern "C" int sparse_mla_splits(int num_tokens, int topk, int clusters) {
  fd_dsa::narrow::Room room = {};
  for (int n = 1; n <= fd_dsa::narrow::kMostSplits; ++n) room[n] = clusters / n;
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
  for (int n = 1; n <= fd_dsa::wide::kMostSplits; ++n) room[n] = blocks / n;
  const auto [first, rest] = fd_dsa::wide::plan_for(num_tokens, groups, topk, room);
  for (int x : {first.tokens, first.splits, rest.tokens, rest.splits}) *found++ = x;
}
