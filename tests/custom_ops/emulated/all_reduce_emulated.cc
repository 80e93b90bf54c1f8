// The all-reduce on emulated GPUs, one for each thread that launches.
#define EMULATED_STATE thread_local
#include "all_reduce_ptx.cuh"
#include "topk_ptx.cuh"
// the others come first, so that their guards keep the hardware's own out
#include "all_reduce.cu"
// text of errors
#include "position_ids.cu"
