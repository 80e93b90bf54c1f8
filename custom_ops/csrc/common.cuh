// What all CUDA files share: how kernels are launched, and what the C ABI answers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fd_dsa {

// Threads of one block, blocks, and the stream as the C ABI passes it.
inline cudaLaunchConfig_t launch_config(unsigned blocks, unsigned threads, void* stream,
                                        unsigned shared_bytes = 0) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

// Launches by the call that answers for itself: cudaGetLastError would answer for others too.
template <typename... Parameters, typename... Arguments>
inline int launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                  Arguments&&... arguments) {
  return static_cast<int>(
      cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...));
}

}  // namespace fd_dsa
