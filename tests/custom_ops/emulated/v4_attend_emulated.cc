// Attention of DeepSeek-V4 on the emulated GPU.
#include "wgmma.cuh"
// the other comes first, so that its guard keeps the hardware's own out
#include "v4_attend.cu"
// text of errors
#include "position_ids.cu"
