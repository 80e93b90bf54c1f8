// The grouped GEMM of experts on the emulated GPU.
#include "tensor_map.cuh"
#include "wgmma.cuh"
// the others come first, so that their guards keep the hardware's own out
#include "expert_gemm.cu"
// text of errors
#include "position_ids.cu"
