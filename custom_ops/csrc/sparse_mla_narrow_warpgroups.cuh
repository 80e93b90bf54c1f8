// Sparse MLA for 9 to 32 heads: two warpgroups that take turns with tiles.
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
template <int kHeads>
__device__ __forceinline__ void attend_tiles(Sums<kHeads>& my, uint32_t base, Tiles tiles,
                                             int group, int warp, int lane) {
  using Shape = Layout<kHeads, Form::kWarpgroups>;
  const uint32_t sums = base + Shape::kSums + group * Shape::kSumBytes;
  const uint32_t weights = base + Shape::kWeights + group * Shape::kWeightBytes;
  start(my);
  uint32_t stage = group, parity = 0;
  int visits = 0;
  for (int32_t at = tiles.first + group * tiles.step; at < tiles.end; at += 2 * tiles.step) {
    const uint32_t tile = base + Shape::kRing + stage * kTileBytes;
    const uint32_t empty = Shape::empty(base, stage);
    barrier_wait(Shape::full(base, stage, group), parity);
    const uint32_t masks = base + Shape::kMasks + stage * 8;
    const uint2 mask = make_uint2(load_shared(masks), load_shared(masks + 4));
    if ((mask.x | mask.y) != 0) {
      put_scores<kHeads>(tile, base + Shape::kQueries, sums, warp, lane);
      named_barrier(kOfFirst + group, 128);
      Shrinks<kHeads> shrinks;
      put_weights<kHeads>(my, shrinks, tile, mask, base, group, warp, lane);
      named_barrier(kOfFirst + group, 128);
      shrink_sums<kHeads>(my, shrinks.of_unit, base, group, lane);
      add_tile<kHeads>(my, tile, weights, empty, warp, lane);
    } else {
      warp_arrive(empty, lane);
    }
    stage += 2;
    if (stage >= Shape::kStages) stage -= Shape::kStages;
    if (++visits == Shape::kVisits) {
      visits = 0;
      parity ^= 1;
    }
  }
}

#endif  // FD_DSA_HOPPER

// A cluster of blocks for each token.
template <int kHeads>
__global__ void __launch_bounds__(Layout<kHeads, Form::kWarpgroups>::kThreads, 1)
    warpgroup_kernel(const __grid_constant__ FdDsaSparseMla job) {
#if defined(FD_DSA_HOPPER)
  using Shape = Layout<kHeads, Form::kWarpgroups>;
  const Place my = begin<Shape>(job);
  if (my.warp >= 4 * Shape::kGroups) {
    copy_and_wait<Shape>(job, my, 4 * Shape::kGroups);
    return;
  }
  more_registers<Shape::kMany>();
  const auto [base, blocks, rank, warp, lane, token, tiles] = my;
  const bool is_alone = blocks == 1;
  const int group = warp / 4, member = warp % 4;
  QueryRows<kHeads> rows;
  load_queries(rows, job, token, warp, lane);
  put_queries(rows, job.softmax_scale, base, warp, lane);
  Sums<kHeads> sums;
  attend_tiles<kHeads>(sums, base, tiles, group, member, lane);
  put_stats<kHeads>(sums, base, group, member, lane);
  if (group == 0) {
    finish<kHeads, 0>(job, token, sums, base, is_alone, member, lane);
  } else {
    finish<kHeads, 1>(job, token, sums, base, is_alone, member, lane);
  }
  if (!is_alone) combine<kHeads, Form::kWarpgroups>(job, token, base, rank, blocks);
#endif
}

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_WARPGROUPS_CUH
