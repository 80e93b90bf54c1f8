// Sparse MLA: device queries of both launchers.
#ifndef FD_DSA_SPARSE_MLA_LAUNCH_CUH
#define FD_DSA_SPARSE_MLA_LAUNCH_CUH

#include <array>

#include "common.cuh"

namespace fd_dsa::sparse_mla {

// largest number of blocks that share a token
constexpr int kMaxSplits = 16;

// [n]: number of clusters of n blocks that a device runs at the same time
using Room = std::array<int, kMaxSplits + 1>;

// Returns how many clusters of a launch run at the same time, or 0 without support.
template <typename Kernel>
int clusters_at_once(Kernel* kernel, const cudaLaunchConfig_t& config) {
  int found = 0;
  if (cudaOccupancyMaxActiveClusters(&found, kernel, &config) == cudaSuccess) return found;
  cudaGetLastError();
  return 0;
}

}  // namespace fd_dsa::sparse_mla

#endif  // FD_DSA_SPARSE_MLA_LAUNCH_CUH
