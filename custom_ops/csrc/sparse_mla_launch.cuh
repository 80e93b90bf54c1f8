// Sparse MLA: what the launchers of both kernels ask of a device.
#ifndef FD_DSA_SPARSE_MLA_LAUNCH_CUH
#define FD_DSA_SPARSE_MLA_LAUNCH_CUH

#include <array>

#include "common.cuh"

namespace fd_dsa::sparse_mla {

// most blocks that share a token
constexpr int kMostSplits = 16;

// Lets a kernel have the shared memory and the clusters that it needs, on Hopper.
template <typename Kernel>
cudaError_t prepare(Kernel* kernel, int32_t bytes, std::atomic<uint64_t>& done) {
  Gpu gpu = {};
  cudaError_t error = find_gpu(gpu);
  // elsewhere the kernel has no body
  if (error == cudaSuccess && gpu.major != 9) error = cudaErrorNoKernelImageForDevice;
  return error != cudaSuccess ? error : fd_dsa::prepare(kernel, gpu.device, bytes, true, done);
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
