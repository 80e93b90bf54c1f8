// Copies of tiles of a matrix by the copy engine of Hopper (TMA), in inline PTX.
#ifndef FD_DSA_TENSOR_MAP_CUH
#define FD_DSA_TENSOR_MAP_CUH

#include <cuda.h>

#include "hopper.cuh"

namespace fd_dsa::hopper {

// A matrix of bytes, from which the copy engine takes tiles of 128 rows by 128 bytes.
//
// A kernel has it as a __grid_constant__ parameter.
using TensorMap = CUtensorMap;

// Describes a matrix whose address and width are multiples of 16.
//
// Rows past the last one read as zeros. There is no library to link for the driver's function, so
// it is looked up at run time.
inline cudaError_t make_tile_map(TensorMap& map, const void* at, uint64_t width, uint64_t rows) {
  using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                          const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                          CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                          CUtensorMapFloatOOBfill);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &state);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &state);
#endif
  if (error != cudaSuccess) return error;
  if (state != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {width, rows}, row_bytes[] = {width};
  const cuuint32_t tile[] = {128, 128}, steps[] = {1, 1};
  const CUresult result = reinterpret_cast<Encode*>(found)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(at), sizes, row_bytes, tile, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Copies 128 swizzled rows of 128 bytes from byte `column` and row `row` on, counted by a barrier.
//
// `to` is a multiple of 1024.
__device__ __forceinline__ void copy_tile(uint32_t to, const TensorMap& map, int column, int row,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

}  // namespace fd_dsa::hopper

#endif  // FD_DSA_TENSOR_MAP_CUH
