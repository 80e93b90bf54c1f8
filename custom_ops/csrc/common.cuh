// What all CUDA files share: sums of a warp, and how kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <utility>

namespace fd_dsa {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum of the values of this lane and the lanes below it.
__device__ __forceinline__ uint32_t warp_prefix(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// What is known of a GPU.
struct Gpu {
  int device, major;
  int num_sms;
  int shared_bytes;  // most that a block can have
};

// The device of the calling thread.
inline cudaError_t find_gpu(Gpu& gpu) {
  cudaError_t error = cudaGetDevice(&gpu.device);
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&gpu.major, cudaDevAttrComputeCapabilityMajor},
      {&gpu.num_sms, cudaDevAttrMultiProcessorCount},
      {&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& [value, attribute] : wanted) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, gpu.device);
  }
  return error;
}

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

// Lets a kernel have so much shared memory and, where asked for, clusters of any size; once for each
// kernel and device, `done` has a bit for each device.
template <typename Kernel>
cudaError_t prepare(Kernel* kernel, int device, int bytes, bool clusters,
                    std::atomic<uint64_t>& done) {
  const uint64_t bit = uint64_t{1} << device % 64;
  if ((done.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && clusters) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Launches by the call that answers for itself: cudaGetLastError would answer for others too.
template <typename... Parameters, typename... Arguments>
inline int launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                  Arguments&&... arguments) {
  return static_cast<int>(
      cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...));
}

}  // namespace fd_dsa
