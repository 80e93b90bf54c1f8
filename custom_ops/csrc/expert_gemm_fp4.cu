// The grouped GEMM of routed experts in MXFP4 by activations in FP8.
//
// A tile is up to 16, 64 or 240 pairs of an expert by 128 columns. A gated tile has 64 columns of the
// gate and the 64 that they multiply. With few pairs two blocks share a multiprocessor, and their time
// is that of reading the weights. A pair's sums do not depend on the size of its tile.
//
// One warpgroup copies operands, 128 values along K at a time, several such stages ahead. Two
// warpgroups multiply, 64 columns each. Columns are the rows of the tensor cores' result, so a
// thread turns four-bit codes into e5m2 codes in its registers, and the tensor cores read them
// there. A code that is turned once meets all pairs of the tile, a third of them at a time.
//
// A group of 32 values has a scale, a power of two. The largest scale of a column multiplies its
// sums at the end, and the exponents of the codes are smaller by what their own scales lack. That is
// exact, as loaded scales are at most 2^26 apart (FourBitWeight of fd_dsa/tensor.py).
//
// A stage's codes of a column are 16 words. A lane has four of them, one of each group, in the order
// in which the tensor cores read its codes. The sizes of a word's codes are selectors of `prmt`, which
// looks up four codes in eight bytes. These bytes are the codes of the eight sizes of e2m1, and differ
// between scales by the same number each.
//
// With up to 16 pairs the rows between both GEMMs can be in FP8, with a scale for each 64 values. Those
// are the columns of a tile of the first GEMM, which writes codes, so no launch has to quantise them.
// The second GEMM then has sums of its own for each half of a stage. It starts to copy its weights
// before it waits for the first one.
//
// In tiles of 240 pairs the warpgroups take turns at turning codes, so that the tensor cores multiply
// for the other one meanwhile. With up to 16 pairs a warpgroup turns the codes of a stage during its
// own GEMM of the stage before.
//
// Sources: OCP Microscaling Formats 1.0 for the formats; PTX ISA 8.5 for `prmt` and for the operands
// of wgmma; FlashAttention-3 (arXiv 2407.08608) section 3.1 for warpgroups that take turns.
#include "expert_gemm_fp4.h"

#include "expert_gemm_fp4_multiply.cuh"

namespace fd_dsa::experts_fp4 {

// Multiplies rows of experts. `blocks` blocks take tiles in turn.
//
// kInFp8: the rows between both GEMMs are in FP8.
template <bool kGated, int kPairs, bool kInFp8>
__global__ void __launch_bounds__(kThreads, Form<kPairs>::kBlocks)
    multiply_experts(const __grid_constant__ Job job, uint32_t blocks) {
#if defined(FD_DSA_HOPPER)
  using F = Form<kPairs>;
  const uint32_t base = shared_address(shared_memory());
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  using Multiplier = experts_fp4::Multiplier<kGated, kPairs, kInFp8>;
  // The launch before makes these rows from the same lists, which are older.
  constexpr bool kEarly = !kGated && kInFp8;
  if (threadIdx.x == 0) prepare_stages(Turn<kPairs>{{base}});
  if (!kEarly) {
    wait_for_inputs();
    start_next();
  }
  if (warp == 1) count_tiles<kPairs>(job, base + F::kEnds, lane);
  __syncthreads();
  if (warp < 8) {
    // also in a block without a tile
    if (kEarly) wait_for_inputs();
    more_registers<F::kComputeRegisters>();
    Multiplier(job, base, warp, lane).run();
  } else {
    fewer_registers<F::kCopyRegisters>();
    const int thread = threadIdx.x % 128;
    copy_tiles(
        Turn<kPairs>{{base}}, F::kMany ? job.taken : nullptr, base + F::kNext, blocks, thread,
        [&](uint32_t number, Tile& tile) {
          return find_even_tile<kPairs>(job, column_groups(job), base + F::kEnds, number, tile);
        },
        [&](const Tile& tile, uint32_t number, Turn<kPairs>& turn) {
          const bool is_early = kEarly && number == blockIdx.x;
          copy_stages<kGated, Multiplier::kScaleParts>(job, tile, thread, is_early, turn);
        });
  }
#endif
}

// ---- the launch

// With fewer pairs of an expert on average tiles have 16, and the rows between both GEMMs may be in FP8.
constexpr int kFew = 16;

// Returns true if the rows between both GEMMs are in FP8.
inline bool is_in_fp8(const Job& job) { return job.out_scales != nullptr || job.x_group < kPiece; }

inline bool is_supported(const Job& job) {
  return has_valid_tiles(job, job.is_gated != 0 ? kHalfColumns : kColumns, 16) &&
         job.factors != nullptr && job.peaks != nullptr && is_aligned(job.peaks) &&
         job.x_stride >= job.num_rows && (!is_in_fp8(job) || mean_pairs(job) < kFew) &&
         (job.x_group == kPiece || (job.x_group == kPiece / 2 && job.is_gated == 0)) &&
         (job.out_scales == nullptr || (job.out_stride >= job.num_pairs && job.is_gated != 0));
}

template <bool kGated, int kPairs, bool kInFp8 = false>
static int launch_experts(const Job& job, void* stream) {
  static std::atomic<uint64_t> prepared{0};
  using F = Form<kPairs>;
  return launch_tiles(multiply_experts<kGated, kPairs, kInFp8>, job, kPairs, column_groups(job),
                      F::kBytes, F::kBlocks, F::kMany ? job.taken : nullptr, stream, prepared);
}

// Launches the form whose tiles hold the pairs of nearly all experts, or large ones. From kManyPairs
// on, tiles have 240 pairs. On an H200 the limits are the fastest of means of 1 to 200 pairs, at the
// widths of DeepSeek-V4-Flash.
template <bool kGated>
static int launch_form(const Job& job, void* stream) {
  const int mean = mean_pairs(job);
  if (is_in_fp8(job)) return launch_experts<kGated, kFew, true>(job, stream);
  if (mean < kFew) return launch_experts<kGated, kFew>(job, stream);
  if (mean < kManyPairs) return launch_experts<kGated, 64>(job, stream);
  return launch_experts<kGated, 240>(job, stream);
}

}  // namespace fd_dsa::experts_fp4

extern "C" int fd_dsa_expert_gemm_fp4_cuda(const FdDsaExpertGemmFp4* job, void* stream) {
  using namespace fd_dsa::experts_fp4;
  if (job->num_pairs <= 0 || job->columns <= 0) return 0;
  if (!is_supported(*job)) return static_cast<int>(cudaErrorInvalidValue);
  return job->is_gated != 0 ? launch_form<true>(*job, stream) : launch_form<false>(*job, stream);
}

extern "C" int fd_dsa_expert_gemm_fp4_bytes() {
  return static_cast<int>(sizeof(FdDsaExpertGemmFp4));
}
