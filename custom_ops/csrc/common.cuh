// Helpers of all CUDA files: sums over a warp, scales of FP8, early launches and kernel launches.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <utility>

namespace fd_dsa {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Returns the sum of the values of this lane and the lanes below it.
__device__ __forceinline__ uint32_t warp_prefix(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Returns the scale x / 448 with the same bits as `quantized` of fd_dsa/ops/dense_kernels.py.
//
// With `round` it is a power of two, whose exponent follows without a division: 448 is 1.75 * 2^8, so
// a larger mantissa than 1.75 needs the next power. The least one is that above 1e-12, 2^-39.
__device__ __forceinline__ float scale_of(float largest, bool round) {
  if (!round) return fmaxf(largest / 448.0f, 1e-12f);
  const uint32_t bits = __float_as_uint(largest), exponent = (bits + 0x1fffffu) >> 23;
  // infinity stays what it is
  return __uint_as_float((bits < 255u << 23 ? max(exponent, 127u - 39 + 8) - 8 : 255) << 23);
}

// Returns 1 / x of a power of two between 2^-126 and 2^126, but -infinity for infinity.
__device__ __forceinline__ float inverse_of_power(float x) {
  return __uint_as_float((254u << 23) - __float_as_uint(x));
}

// Waits for the launches before, if this one began early. fd_dsa.triton_runtime.pdl explains
// programmatic dependent launch.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch begin, if it may begin early.
__device__ __forceinline__ void start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns true for null, too.
inline bool is_aligned(const void* at, int bytes = 16) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

// Properties of a GPU.
struct Gpu {
  int device, major;
  int num_sms;
  int shared_bytes;  // largest shared memory of a block
};

// Queries the device of the calling thread.
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

// Returns a configuration for the stream as the C ABI passes it.
inline cudaLaunchConfig_t launch_config(unsigned blocks, unsigned threads, void* stream,
                                        unsigned shared_bytes = 0) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

// Allows a kernel this much shared memory and, on request, clusters of any size.
//
// Each bit of `done` marks a device for which the kernel is prepared already.
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

// Queries the device, and prepares a kernel for Hopper. Other devices have an empty kernel.
template <typename Kernel>
cudaError_t prepare_on_hopper(Kernel* kernel, int bytes, bool clusters,
                              std::atomic<uint64_t>& done, Gpu& gpu) {
  const cudaError_t error = find_gpu(gpu);
  if (error != cudaSuccess) return error;
  if (gpu.major != 9) return cudaErrorNoKernelImageForDevice;
  return prepare(kernel, gpu.device, bytes, clusters, done);
}

// Attributes of a launch, which they must outlive.
using LaunchAttributes = std::array<cudaLaunchAttribute, 2>;

inline cudaLaunchAttribute& add_attribute(cudaLaunchConfig_t& config, LaunchAttributes& attributes,
                                          cudaLaunchAttributeID id) {
  cudaLaunchAttribute& added = attributes[config.numAttrs++];
  added = {};
  added.id = id;
  config.attrs = attributes.data();
  return added;
}

// Makes clusters of so many blocks.
inline void set_cluster(cudaLaunchConfig_t& config, LaunchAttributes& attributes, int blocks) {
  add_attribute(config, attributes, cudaLaunchAttributeClusterDimension).val.clusterDim = {
      static_cast<unsigned>(blocks), 1, 1};
}

// Lets a launch begin before the previous one has ended, from Hopper on.
inline void start_early(cudaLaunchConfig_t& config, LaunchAttributes& attributes) {
  constexpr auto kEarly = cudaLaunchAttributeProgrammaticStreamSerialization;
  add_attribute(config, attributes, kEarly).val.programmaticStreamSerializationAllowed = 1;
}

// Launches a kernel and returns the error of this launch only.
//
// cudaGetLastError would also return errors of other calls.
template <typename... Parameters, typename... Arguments>
inline int launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                  Arguments&&... arguments) {
  return static_cast<int>(
      cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...));
}

}  // namespace fd_dsa
