// Sparse MLA for few heads: a warpgroup's way over its tiles.
#ifndef FD_DSA_SPARSE_MLA_NARROW_WALK_CUH
#define FD_DSA_SPARSE_MLA_NARROW_WALK_CUH

#include "sparse_mla_narrow_tile.cuh"

namespace fd_dsa::narrow {

#if defined(FD_DSA_HOPPER)

// The state before the first tile.
template <int kHeads>
__device__ __forceinline__ void start(State<kHeads>& state) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < kHeads / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) state.out[i][j][k] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kHeads / 4; ++i) {
    state.top[i] = -INFINITY;
    state.total[i] = 0.0f;
  }
  state.exponent = 1;
}

// All tiles of one warpgroup.
template <int kHeads, Form kForm>
__device__ __forceinline__ void attend_tiles(State<kHeads>& state, const Queries<kHeads>& queries,
                                             uint32_t base, Tiles tiles, int group, int warp,
                                             int lane) {
  using Shape = Layout<kHeads, kForm>;
  constexpr int kTurns = Shape::kParts;
  start(state);
  const uint32_t sums = base + Shape::kSums + group * Shape::kSumBytes;
  const uint32_t weights = base + Shape::kWeights + group * Shape::kWeightBytes;
  const uint32_t shrinks = base + Shape::kShrinks + group * (kHeads * 4);
  const int32_t turn = kTurns > 1 ? group : 0;
  uint32_t stage = turn, parity = 0;
  for (int32_t at = tiles.first + turn * tiles.step; at < tiles.end; at += kTurns * tiles.step) {
    const uint32_t tile = base + Shape::kRing + stage * kTileBytes;
    barrier_wait(Shape::full(base, stage), parity);
    const uint32_t masks = base + Shape::kMasks + stage * 8;
    const uint2 mask = make_uint2(load_shared(masks), load_shared(masks + 4));
    if ((mask.x | mask.y) != 0) {
      Scores<kHeads> scores = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) add_scores<kHeads>(scores, queries, tile, i, warp, lane);
      const uint32_t scale_top = put_scores<kHeads>(scores, queries, tile, sums, warp, lane);
      named_barrier(kOfFirst + group, 128);
      put_weights<kHeads>(state, mask, sums, weights, shrinks, warp, lane);
      named_barrier(kOfFirst + group, 128);
      shrink_out<kHeads>(state, scale_top, shrinks, lane);
      const float unit = __uint_as_float((254 - min(state.exponent, 253u)) << 23);
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        add_latents<kHeads>(state, tile, weights, i, unit, warp, lane);
      }
    }
    // all that this warp read of the tile is in registers
    warp_arrive(Shape::empty(base, stage), lane);
    stage += kTurns;
    if (stage >= Shape::kStages) {
      stage -= Shape::kStages;
      parity ^= 1;
    }
  }
}

#endif  // FD_DSA_HOPPER

}  // namespace fd_dsa::narrow

#endif  // FD_DSA_SPARSE_MLA_NARROW_WALK_CUH
