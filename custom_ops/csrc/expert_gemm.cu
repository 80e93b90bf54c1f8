// The grouped GEMM of routed experts in block FP8, for prompts: 128 rows of an expert at a time.
//
// A block stays on its multiprocessor and takes tile after tile of the result. A tile is 128 pairs
// of an expert by two blocks of 128 columns. A gated tile has one block of the gate and one of the
// columns that it multiplies.
//
// One warpgroup copies operands, 128 bytes along K at a time, up to four such stages ahead. It goes
// on with the next tile while the last one is written. Rows of `x`, which the list of pairs names,
// come by copies of 16 bytes, and weights by the copy engine (TMA). Two warpgroups multiply, 64
// rows each. A partial sum over 128 values has its own scale, so it starts at zero and is then
// scaled and added to sums in float32 registers. While one warpgroup adds, the other uses the
// tensor cores.
//
// A tile has two blocks of columns because, at full rate, a tile of 128 x 128 would read 64 bytes a
// cycle from L2, more than L2 delivers. With two blocks the sums take 128 registers of a thread,
// and a partial product 64.
//
// Blocks take tiles in order from a counter. Weights are most of the reads: with 8,192 tokens and
// 256 experts all rows of an expert are 2 MB, and the weights of its tiles 29 MB.
//
// Sources: DeepSeek-V3 (arXiv 2412.19437) §3.5.2 for sums in two steps; CUTLASS's kernels for
// Hopper for separate warpgroups that multiply and that copy.
#include "expert_gemm.h"

#include "expert_tiles.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace fd_dsa::experts {

using namespace hopper;
using Job = FdDsaExpertGemm;

constexpr int kGroup = 128;  // values that share a scale, columns of a block, rows of a tile
constexpr int kStages = 4, kThreads = 384;

// Offsets in shared memory, in bytes. An operand is 128 rows of 128 bytes, swizzled. A stage has
// one operand of rows and one of each block of columns.
constexpr uint32_t kOperand = kGroup * 128, kStage = 3 * kOperand;
// The 16 output rows of 128 bytes of each warp. Another 16 bytes put neighbours in different banks.
constexpr uint32_t kLine = 128 + 16, kLines = kStages * kStage;
// The scales of a stage's rows and of both weights, and the number of its tile.
constexpr uint32_t kScales = kLines + 8 * 16 * kLine, kStageScaleBytes = (kGroup + 4) * 4;
constexpr uint32_t kWeightScales = kGroup * 4;
[[maybe_unused]] constexpr uint32_t kOwnTile = kWeightScales + 8;
constexpr uint32_t kEnds = kScales + kStages * kStageScaleBytes;
constexpr uint32_t kNext = kEnds + 4 * kMaxExperts;
constexpr uint32_t kBarriers = kNext + 2 * 4;
constexpr uint32_t kBytes = kBarriers + 2 * kStages * 8;
static_assert(kBytes <= 232448 && kBarriers % 8 == 0 && kLines % 16 == 0 && kNext % 8 == 0);

// Returns the count of column groups, of two blocks of columns each.
__host__ __device__ __forceinline__ int column_groups(const Job& job) {
  const int blocks = job.columns / kGroup;
  return job.is_gated != 0 ? blocks : (blocks + 1) / 2;
}

#if defined(FD_DSA_HOPPER)

struct Turn : StageTurn<kStages, kBarriers> {
  __device__ __forceinline__ uint32_t operands() const { return base + stage * kStage; }
  __device__ __forceinline__ uint32_t scales() const {
    return base + kScales + stage * kStageScaleBytes;
  }
  __device__ __forceinline__ uint32_t own_tile() const { return scales() + kOwnTile; }
};

// ---- tiles

// Returns the weight block of the tile's column block 0 or 1.
//
// With an odd number of blocks, the last tile has the last block twice.
__device__ __forceinline__ int weight_block(const Job& job, const Tile& tile, int which) {
  const int blocks = job.columns / kGroup;
  if (job.is_gated != 0) return tile.group + which * blocks;
  return min(2 * tile.group + which, blocks - 1);
}

// ---- the warpgroup that copies operands

// Copies all stages of a tile. Thread t copies chunk t % 8 of rows t / 8 + 16 i, and the scale of
// row t.
__device__ __forceinline__ void copy_stages(const Job& job, const TensorMap& weight,
                                            const Tile& tile, uint32_t number, int thread,
                                            Turn& turn) {
  constexpr int kRowsPerThread = kGroup / 16;
  const int32_t* pairs = pairs_of(job, tile);
  uint32_t chunks[kRowsPerThread];  // from the beginning of `x`
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int at = thread / 8 + i * 16;
    const uint32_t row = at < tile.left ? __ldg(pairs + at) / job.row_pairs : 0;
    chunks[i] = row * (job.width / 16) + thread % 8;
  }
  const bool has_scale = thread < tile.left;
  const float* scale = job.x_scales + (has_scale ? __ldg(pairs + thread) / job.row_pairs : 0);
  const int groups = job.width / kGroup, blocks = job.columns / kGroup * (1 + job.is_gated);
  // only two threads use it
  const float* weight_scale =
      job.weight_scales +
      (static_cast<int64_t>(tile.expert) * blocks + weight_block(job, tile, thread % 2)) * groups;
  const int first = (tile.expert * blocks + weight_block(job, tile, 0)) * kGroup;
  const int second = (tile.expert * blocks + weight_block(job, tile, 1)) * kGroup;
  const uint32_t to = swizzled(thread / 8, thread % 8);
  const char* x = static_cast<const char*>(job.x);
  for (int group = 0; group < groups; ++group, turn.advance()) {
    const uint32_t operands = turn.operands(), scales = turn.scales(), full = turn.is_full();
    barrier_wait(turn.is_free(), turn.parity ^ 1);
    if (thread == 0) {
      store_shared(turn.own_tile(), number);
      barrier_arrive_expecting(full, 2 * kOperand);
      copy_tile(operands + kOperand, weight, group * kGroup, first, full);
      copy_tile(operands + 2 * kOperand, weight, group * kGroup, second, full);
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      // the swizzle repeats after 16 rows
      copy_16(operands + to + i * 16 * 128, x + static_cast<uint64_t>(chunks[i]) * 16,
              thread / 8 + i * 16 < tile.left);
    }
    copy_few<4>(scales + thread * 4, scale, has_scale);
    if (thread < 2) copy_few<4>(scales + kWeightScales + thread * 4, weight_scale + group, true);
    barrier_arrive_after_copies(full);
    x += kGroup;
    scale += job.x_stride;
  }
}

// ---- the warpgroups that multiply

// Warpgroup 0 or 1 with its 64 rows of each tile.
//
// A thread has rows `row` and `row` + 8 of its warp's 16 rows of a result, and two neighbouring
// columns in each block of 8. Value j * 4 + r * 2 + c is that of row lane / 4 + 8 r and column 8 j
// + lane % 4 * 2 + c.
struct Multiplier {
  const Job& job;
  uint32_t base;
  int warpgroup, warp, lane;  // index of the warp in its warpgroup
  Turn turn;
  float sums[2][64], part[64];

  __device__ __forceinline__ Multiplier(const Job& job, uint32_t base, int warpgroup, int warp,
                                        int lane)
      : job(job), base(base), warpgroup(warpgroup), warp(warp), lane(lane), turn{{base}} {}

  // Returns the first of this warp's rows of a tile.
  __device__ __forceinline__ int first_row() const { return warpgroup * 64 + warp * 16; }

  // Sets `part` to the rows times a block of columns, over the stage.
  template <int kBlock>
  __device__ __forceinline__ void multiply() {
    const uint32_t stage = turn.operands();
    const Operand rows = k_major(stage + warpgroup * (64 * 128));
    const Operand columns = k_major(stage + (1 + kBlock) * kOperand);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_codes(part, rows.at(i * 32), columns.at(i * 32), i > 0);
    wgmma_commit();
  }

  template <int kBlock>
  __device__ __forceinline__ void add(const float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[kBlock][i] += part[i] * scale[i >> 1 & 1];
  }

  // Adds a full stage to the sums.
  __device__ __forceinline__ void step() {
    // The copies of threads become visible to wgmma here, as a fence after the copy would wait for
    // it.
    publish_to_async();
    multiply<0>();
    const uint32_t scales = turn.scales(), own = scales + (first_row() + lane / 4) * 4;
    const float row_scales[2] = {load_shared_float(own), load_shared_float(own + 8 * 4)};
    const float first_scale = load_shared_float(scales + kWeightScales);
    const float second_scale = load_shared_float(scales + kWeightScales + 4);
    wgmma_wait<0>();
    pin(part);
    add<0>({row_scales[0] * first_scale, row_scales[1] * first_scale});
    multiply<1>();
    wgmma_wait<0>();
    pin(part);
    warp_arrive(turn.is_free(), lane);
    add<1>({row_scales[0] * second_scale, row_scales[1] * second_scale});
  }

  // Adds all stages of a tile, the first of which is full.
  __device__ __forceinline__ void run(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i] = 0.0f;
    // missing rows need no work
    const bool is_live = tile.left > warpgroup * 64;
    const int groups = job.width / kGroup;
    for (int group = 0; group < groups; ++group, turn.advance()) {
      if (group > 0) barrier_wait(turn.is_full(), turn.parity);
      if (is_live) {
        step();
      } else {
        warp_arrive(turn.is_free(), lane);
      }
    }
  }

  // Returns the address of this warp's output rows.
  __device__ __forceinline__ uint32_t lines() const {
    return base + kLines + (warpgroup * 4 + warp) * (16 * kLine);
  }

  // Writes 128 bytes of each row of the warp from shared memory to global memory.
  //
  // A lane writes 16 bytes of rows lane / 8 + 4 i. `out` is the address for row 0, and rows are
  // `row_bytes` apart.
  __device__ __forceinline__ void write_lines(const Tile& tile, const int32_t (&pair)[4], char* out,
                                              int64_t row_bytes) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 8 + i * 4;
      const uint4 values = load_shared_uint4(lines() + row * kLine + lane % 8 * 16);
      if (first_row() + row < tile.left) {
        *reinterpret_cast<uint4*>(out + pair[i] * row_bytes + lane % 8 * 16) = values;
      }
    }
    __syncwarp();
  }

  // Writes the tile as bfloat16.
  __device__ __forceinline__ void store_values(const Tile& tile, const int32_t (&pair)[4]) {
    const uint32_t to = lines() + lane / 4 * kLine + lane % 4 * 4;
    const int64_t row_bytes = static_cast<int64_t>(job.columns) * 2;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int column = tile.group * 2 * kGroup + quarter * 64;
      if (column >= job.columns) break;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        // 8 blocks of 8 columns of 16 bytes each, with two rows each
        const float* x = sums[quarter / 2] + quarter % 2 * 32 + i * 2;
        store_shared(to + i % 2 * (8 * kLine) + i / 2 * 16, pack_bfloat16(x[0], x[1]));
      }
      write_lines(tile, pair, static_cast<char*>(job.out) + column * 2, row_bytes);
    }
  }

  // Writes silu of the first block times the second block as FP8.
  __device__ __forceinline__ void store_gated(const Tile& tile, const int32_t (&pair)[4]) {
    float largest[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
      // rounded to bfloat16; fmaxf ignores NaN
      const uint32_t both = pack_bfloat16(silu_times(sums[0][i], sums[1][i]),
                                          silu_times(sums[0][i + 1], sums[1][i + 1]));
      float& top = largest[i >> 1 & 1];
      sums[0][i] = low_of(both), sums[0][i + 1] = high_of(both);
      top = fmaxf(top, fmaxf(fabsf(sums[0][i]), fabsf(sums[0][i + 1])));
    }
    const bool round = job.round_scales != 0;
    float* const out_scales = job.out_scales + tile.group * job.out_stride;
    const uint32_t to = lines() + lane / 4 * kLine + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = largest[r];
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float scale = scale_of(top, round), inverse = 1.0f / scale;
      const int row = first_row() + lane / 4 + r * 8;
      if (lane % 4 == 0 && row < tile.left) {
        out_scales[__ldg(pairs_of(job, tile) + row)] = scale;
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float x = sums[0][j * 4 + r * 2], y = sums[0][j * 4 + r * 2 + 1];
        // the inverse of a power of two is exact
        if (round) x *= inverse, y *= inverse;
        else x /= scale, y /= scale;
        store_shared(to + r * (8 * kLine) + j * 8, pack_codes(x, y));
      }
    }
    write_lines(tile, pair, static_cast<char*>(job.out) + tile.group * kGroup, job.columns);
  }

  // Multiplies tile after tile.
  __device__ __forceinline__ void run() {
    for (;;) {
      barrier_wait(turn.is_full(), turn.parity);
      const uint32_t number = load_shared(turn.own_tile());
      Tile tile;
      if (number == kNoTile ||
          !find_tile<kGroup>(job, column_groups(job), base + kEnds, number, tile)) {
        return;
      }
      run(tile);
      if (first_row() >= tile.left) continue;
      int32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row() + lane / 8 + i * 4;
        pair[i] = row < tile.left ? __ldg(pairs_of(job, tile) + row) : 0;
      }
      if (job.is_gated != 0) {
        store_gated(tile, pair);
      } else {
        store_values(tile, pair);
      }
    }
  }
};

#endif

// Registers of a multiplying thread and of a copying thread, which start with 168 each.
constexpr int kComputeRegisters = 232, kCopyRegisters = 40;
static_assert(2 * kComputeRegisters + kCopyRegisters == 3 * 168);

// Multiplies rows of experts. `blocks` blocks take tiles in turn.
__global__ void __launch_bounds__(kThreads, 1)
    multiply_experts(const __grid_constant__ Job job, const __grid_constant__ TensorMap weight,
                     uint32_t blocks) {
#if defined(FD_DSA_HOPPER)
  const uint32_t base = shared_address(shared_memory());
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) prepare_stages(Turn{{base}});
  if (warpgroup == 0 && warp == 1) count_tiles<kGroup>(job, base + kEnds, lane);
  __syncthreads();
  if (warpgroup < 2) {
    more_registers<kComputeRegisters>();
    Multiplier(job, base, warpgroup, warp, lane).run();
  } else {
    fewer_registers<kCopyRegisters>();
    const int thread = threadIdx.x % 128;
    copy_tiles(
        Turn{{base}}, job.taken, base + kNext, blocks, thread,
        [&](uint32_t number, Tile& tile) {
          return find_tile<kGroup>(job, column_groups(job), base + kEnds, number, tile);
        },
        [&](const Tile& tile, uint32_t number, Turn& turn) {
          copy_stages(job, weight, tile, number, thread, turn);
        });
  }
#endif
}

// ---- the launch

inline bool is_supported(const Job& job) {
  return job.width > 0 && job.width % kGroup == 0 && job.columns % kGroup == 0 &&
         job.num_experts > 0 && job.num_experts <= kMaxExperts && job.row_pairs > 0 &&
         job.taken != nullptr && (job.is_gated != 0) == (job.out_scales != nullptr) &&
         // 32-bit numbers count the weight's rows and the chunks of x
         static_cast<int64_t>(job.num_experts) * job.columns * 2 < 1ll << 31 &&
         static_cast<int64_t>(job.num_pairs) / job.row_pairs * (job.width / 16) < 1ll << 32 &&
         is_aligned(job.x) && is_aligned(job.weight) && is_aligned(job.out);
}

static int launch_experts(const Job& job, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  if (job.num_pairs <= 0 || job.columns <= 0) return 0;
  if (!is_supported(job)) return static_cast<int>(cudaErrorInvalidValue);
  uint32_t blocks = 0;
  cudaError_t error = prepare_tiles(multiply_experts, job, kGroup, column_groups(job), kBytes, 1,
                                    job.taken, stream, prepared, blocks);
  TensorMap weight;
  if (error == cudaSuccess) {
    const int64_t rows =
        static_cast<int64_t>(job.num_experts) * job.columns * (job.is_gated != 0 ? 2 : 1);
    error = make_tile_map(weight, job.weight, job.width, rows);
  }
  if (error != cudaSuccess) return static_cast<int>(error);
  return launch(launch_config(blocks, kThreads, stream, kBytes), multiply_experts, job, weight,
                blocks);
}

}  // namespace fd_dsa::experts

extern "C" int fd_dsa_expert_gemm_cuda(const FdDsaExpertGemm* job, void* stream) {
  return fd_dsa::experts::launch_experts(*job, stream);
}

extern "C" int fd_dsa_expert_gemm_bytes() { return static_cast<int>(sizeof(FdDsaExpertGemm)); }
