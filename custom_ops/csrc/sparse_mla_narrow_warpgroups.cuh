// Sparse MLA for 9 to 32 heads: two or three warpgroups that take turns with tiles.
//
// Keys and latents are the 64 rows of a warpgroup's products, in registers, where codes become
// float16 once for all heads; heads are the columns, in shared memory: queries once a token,
// weights once a tile. Warps have keys in the scores and latents in the sums, so scores and weights
// go through shared memory, where each warp makes the softmax of some heads.
#ifndef FD_DSA_SPARSE_MLA_NARROW_WARPGROUPS_CUH
#define FD_DSA_SPARSE_MLA_NARROW_WARPGROUPS_CUH

#include "sparse_mla_narrow_copy.cuh"
#include "sparse_mla_narrow_exchange.cuh"
#include "sparse_mla_narrow_weights.cuh"

namespace fd_dsa::narrow {

#if defined(FD_DSA_HOPPER)

// All tiles of a token that one warpgroup has.
template <typename Shape>
__device__ __forceinline__ void attend_tiles(Sums<Shape::kHeads>& my, uint32_t base, Tiles tiles,
                                             int group, int warp, int lane) {
  constexpr int kHeads = Shape::kHeads;
  const uint32_t sums = base + Shape::kSums + group * Shape::kSumBytes;
  const uint32_t weights = base + Shape::kWeights + group * Shape::kWeightBytes;
  start(my);
  uint32_t stage = group, parity = 0;
  int visits = 0;
  const int32_t step = Shape::kGroups * tiles.step;
  for (int32_t at = tiles.first + group * tiles.step; at < tiles.end; at += step) {
    const uint32_t tile = base + Shape::kRing + stage * kTileBytes;
    const uint32_t empty = Shape::empty(base, stage);
    barrier_wait(Shape::full(base, stage, group), parity);
    uint2 mask;
    if (put_scores<kHeads>(mask, base + Shape::kMasks + stage * 8, tile, base + Shape::kQueries,
                           sums, warp, lane)) {
      named_barrier(kOfFirst + group, 128);
      Shrinks<kHeads> shrinks;
      const bool moves = put_weights<Shape>(my, shrinks, tile, mask, base, group, warp, lane);
      if (any_at_barrier(kOfFirst + group, 128, moves)) {
        shrink_sums<Shape>(my, shrinks, base, group, warp, lane);
      }
      add_tile<kHeads>(my, tile, weights, empty, warp, lane);
    } else {
      warp_arrive(empty, lane);
    }
    stage += Shape::kGroups;
    if (stage >= Shape::kStages) stage -= Shape::kStages;
    if (++visits == Shape::kVisits) {
      visits = 0;
      parity ^= 1;
    }
  }
}

#endif  // FD_DSA_HOPPER

// A cluster of blocks for each token.
template <int kHeads, Form kForm>
__global__ void __launch_bounds__(Layout<kHeads, kForm>::kThreads, 1)
    warpgroup_kernel(const __grid_constant__ FdDsaSparseMla job) {
#if defined(FD_DSA_HOPPER)
  using Shape = Layout<kHeads, kForm>;
  const Place my = begin<Shape>(job);
  if (my.warp >= 4 * Shape::kGroups) {
    copy_and_wait<Shape>(job, my, 4 * Shape::kGroups);
    return;
  }
  more_registers<Shape::kMany>();
  const auto [base, blocks, rank, warp, lane, token, tiles] = my;
  const bool is_alone = blocks == 1;
  const int group = warp / 4, member = warp % 4;
  QueryRows<Shape> rows;
  load_queries(rows, job, token, warp, lane);
  put_queries(rows, job.softmax_scale, base, warp, lane);
  Sums<kHeads> sums;
  attend_tiles<Shape>(sums, base, tiles, group, member, lane);
  put_stats<Shape>(sums, base, group, member, lane);
  if (group == 0) {
    finish<Shape, 0>(job, token, sums, base, is_alone, member, lane);
  } else if (Shape::kGroups == 2 || group == 1) {
    finish<Shape, 1>(job, token, sums, base, is_alone, member, lane);
  } else {
    finish<Shape, 2>(job, token, sums, base, is_alone, member, lane);
  }
  if (!is_alone) combine<kHeads, kForm>(job, token, base, rank, blocks);
#endif
}

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_WARPGROUPS_CUH
