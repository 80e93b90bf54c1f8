// The grouped GEMM of routed experts in NVFP4 or INT4 by activations in bfloat16.
//
// A tile is up to 128 pairs of an expert by 256 columns. A gated tile has 128 columns of the gate
// and the 128 that they multiply. A tile is that wide because activations have four times the bytes
// of codes. At the full rate of the tensor cores, a stage reads 25 bytes a cycle from L2.
//
// One warpgroup copies operands, 128 values along K at a time, up to four such stages ahead. Two
// warpgroups multiply, two blocks of 64 columns each. Columns are the rows of the tensor cores'
// result, so a thread turns four-bit codes into bfloat16 in its registers, and the tensor cores read
// them there. In NVFP4 the warpgroup turns the codes of the next block while they multiply this one.
// In INT4 a warpgroup waits for each GEMM, and turns codes during the GEMMs of the other warpgroup.
//
// Code n of word w is value 16 n + w of a stage. So a step of 16 values has one code of each word,
// and a thread has the words of its four values of each step. Codes of e2m1 become bfloat16 times
// 2^-126 by shifts and masks, and a scale of e4m3 multiplies them exactly. Integers become 128 plus
// the code. Their scales have too many bits for bfloat16, and multiply the float32 sums of a stage.
//
// A pair's sums do not depend on the size of its tile.
//
// Sources: PTX ISA 8.5 for `mul` of bf16x2, which keeps denormal numbers, and for the operands of
// wgmma; Marlin (arXiv 2408.11743) for four-bit weights that are stored in the order of registers.
#include "expert_gemm_w4a16.h"

#include "expert_gemm_w4a16_multiply.cuh"

namespace fd_dsa::experts_w4a16 {

// Multiplies rows of experts. `blocks` blocks take tiles in turn.
template <bool kGated, bool kInteger>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_experts(const __grid_constant__ Job job, uint32_t blocks) {
#if defined(FD_DSA_HOPPER)
  const uint32_t base = shared_address(shared_memory());
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) prepare_stages(Turn{{base}});
  wait_for_inputs();
  start_next();
  if (warp == 1) count_tiles<kPairs>(job, base + kEnds, lane);
  __syncthreads();
  if (warp < 8) {
    more_registers<kComputeRegisters>();
    Multiplier<kGated, kInteger>(job, base, warp, lane).run_tiles();
  } else {
    fewer_registers<kCopyRegisters>();
    const int thread = threadIdx.x % 128;
    copy_tiles(
        Turn{{base}}, job.taken, base + kNext, blocks, thread,
        [&](uint32_t number, Tile& tile) {
          return find_even_tile<kPairs>(job, column_groups(job), base + kEnds, number, tile);
        },
        [&](const Tile& tile, uint32_t, Turn& turn) {
          copy_stages<kGated, kInteger>(job, tile, thread, turn);
        });
  }
#endif
}

// ---- the launch

inline bool is_supported(const Job& job) {
  return has_valid_tiles(job, job.is_gated != 0 ? kHalfColumns : kColumns, 8) &&
         (job.factors != nullptr || job.is_integer != 0);
}

template <bool kGated, bool kInteger>
static int launch_experts(const Job& job, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  return launch_tiles(multiply_experts<kGated, kInteger>, job, kPairs, column_groups(job), kBytes, 1,
                      job.taken, stream, prepared);
}

}  // namespace fd_dsa::experts_w4a16

extern "C" int fd_dsa_expert_gemm_w4a16_cuda(const FdDsaExpertGemmW4a16* job, void* stream) {
  using namespace fd_dsa::experts_w4a16;
  if (job->num_pairs <= 0 || job->columns <= 0) return 0;
  if (!is_supported(*job)) return static_cast<int>(cudaErrorInvalidValue);
  const bool is_gated = job->is_gated != 0;
  if (job->is_integer != 0) {
    return is_gated ? launch_experts<true, true>(*job, stream)
                    : launch_experts<false, true>(*job, stream);
  }
  return is_gated ? launch_experts<true, false>(*job, stream)
                  : launch_experts<false, false>(*job, stream);
}

extern "C" int fd_dsa_expert_gemm_w4a16_bytes() {
  return static_cast<int>(sizeof(FdDsaExpertGemmW4a16));
}
