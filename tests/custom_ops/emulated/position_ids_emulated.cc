// The kernels of csrc/capi.cu on the emulated GPU, behind their C ABI.
#include <utility>

// blocks run one after the other
#define __shared__ static
#define __grid_constant__

#include "cuda_runtime.h"

struct int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int32_t __shfl_up_sync(unsigned lanes, int32_t value, int step) {
  return static_cast<int32_t>(__shfl_up_sync(lanes, static_cast<uint32_t>(value), unsigned(step)));
}
constexpr int cudaErrorMisalignedAddress = 716;
inline const char* cudaGetErrorString(cudaError_t) { return "no CUDA here"; }

#include "capi.cu"
