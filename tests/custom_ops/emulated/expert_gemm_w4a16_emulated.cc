// The grouped GEMM of experts in NVFP4 or INT4 on the emulated GPU.
#include "wgmma.cuh"
// the other comes first, so that its guard keeps the hardware's own out
#include "expert_gemm_w4a16.cu"
// text of errors
#include "position_ids.cu"
