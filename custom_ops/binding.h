// What the bindings share: checks of arguments, and where a kernel runs.
#pragma once

#include <string>

#include "paddle/phi/api/ext/op_meta_info.h"

#if defined(PADDLE_WITH_CUSTOM_DEVICE) && !defined(PADDLE_WITH_CUDA)
#include "paddle/phi/backends/context_pool.h"
#endif

extern "C" const char* fd_dsa_cuda_error(int error);

namespace fd_dsa {

// True where this library has kernels for the memory of a GPU.
#if defined(PADDLE_WITH_CUDA) || defined(PADDLE_WITH_CUSTOM_DEVICE)
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Shape of a tensor in words: [2, 3].
inline std::string shape_of(const paddle::Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.shape()) {
    text += (text.empty() ? "[" : ", ") + std::to_string(size);
  }
  return text.empty() ? "[]" : text + "]";
}

// Refuses a tensor of another type, or in other memory than the operator's first tensor.
inline void check_tensor(const char* op, const char* name, const paddle::Tensor& tensor,
                         paddle::DataType dtype, const paddle::Tensor& first) {
  PD_CHECK(tensor.dtype() == dtype, op, ": ", name, ": got dtype ", tensor.dtype(),
           ", allowed is ", dtype, "; convert it");
  PD_CHECK(tensor.place() == first.place(), op, ": ", name, ": lies on ", tensor.place(),
           ", the first tensor on ", first.place(), "; put all of them in one place");
}

// Refuses a tensor that is not a vector of this many entries.
inline void check_vector(const char* op, const char* name, const paddle::Tensor& tensor,
                         int64_t size, const char* what) {
  PD_CHECK(tensor.shape().size() == 1 && tensor.shape()[0] == size, op, ": ", name,
           ": got shape ", shape_of(tensor), ", allowed is [", size, "] = [", what, "]");
}

// Refuses a number out of range.
inline void check_range(const char* op, const char* name, int64_t value, int64_t low,
                        int64_t high) {
  PD_CHECK(value >= low && value <= high, op, ": ", name, ": got ", value, ", allowed are ", low,
           "..", high);
}

// Whether a tensor lies in host memory. Refuses memory that this library has no kernels for.
inline bool runs_on_cpu(const char* op, const paddle::Tensor& tensor) {
  if (tensor.is_cpu()) return true;
  const bool is_device =
#if defined(PADDLE_WITH_CUDA)
      tensor.is_gpu();
#else
      kHasCuda && tensor.is_custom_device();
#endif
  PD_CHECK(is_device, op, ": the tensors lie on ", tensor.place(),
           ", but this build of fd_dsa_ops has kernels for ",
           kHasCuda ? "host memory and its GPU" : "host memory alone", "; build it beside a ",
           "Paddle that has CUDA");
  return false;
}

// The stream of a tensor's device on which Paddle queues its own work now.
inline void* stream_of(const paddle::Tensor& tensor) {
#if defined(PADDLE_WITH_CUDA)
  return static_cast<void*>(tensor.stream());
#elif defined(PADDLE_WITH_CUSTOM_DEVICE)
  auto* context = phi::DeviceContextPool::Instance().Get(tensor.place());
  return static_cast<phi::CustomContext*>(context)->stream();
#else
  return nullptr;
#endif
}

// Throws where a launcher's answer is an error.
inline void check_launch(const char* op, int error) {
#if defined(PADDLE_WITH_CUDA) || defined(PADDLE_WITH_CUSTOM_DEVICE)
  PD_CHECK(error == 0, op, ": the kernel cannot be launched: ", fd_dsa_cuda_error(error), " (",
           error, ")");
#endif
}

}  // namespace fd_dsa
