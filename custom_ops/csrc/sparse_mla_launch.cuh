// Sparse MLA: what the launchers of both kernels ask of a device.
#ifndef FD_DSA_SPARSE_MLA_LAUNCH_CUH
#define FD_DSA_SPARSE_MLA_LAUNCH_CUH

#include <array>
#include <atomic>

#include "common.cuh"

namespace fd_dsa::sparse_mla {

// most blocks that share a token
constexpr int kMostSplits = 16;

// Lets a kernel have the shared memory and the clusters that it needs; asked once for each kernel
// and device, `done` has a bit for each device.
template <typename Kernel>
cudaError_t prepare(Kernel* kernel, int32_t bytes, std::atomic<uint64_t>& done) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << device % 64;
  if (error != cudaSuccess || (done.load(std::memory_order_relaxed) & bit) != 0) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  // elsewhere the kernel has no body
  if (error == cudaSuccess && major != 9) error = cudaErrorNoKernelImageForDevice;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// [n]: clusters of n blocks that a device holds at once.
using Room = std::array<int, kMostSplits + 1>;

// How many clusters of a launch a device holds at once; 0 where it cannot have them.
template <typename Kernel>
int clusters_at_once(Kernel* kernel, const cudaLaunchConfig_t& config) {
  int found = 0;
  if (cudaOccupancyMaxActiveClusters(&found, kernel, &config) == cudaSuccess) return found;
  cudaGetLastError();
  return 0;
}

}  // namespace fd_dsa::sparse_mla

#endif  // FD_DSA_SPARSE_MLA_LAUNCH_CUH
