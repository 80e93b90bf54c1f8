// The all-reduce on emulated GPUs, one for each thread that launches.
#define EMULATED_STATE thread_local
#include "ptx.cuh"
// the other comes first, so that its guard keeps the hardware's own out
#include "all_reduce.cu"
// text of errors
#include "position_ids.cu"
