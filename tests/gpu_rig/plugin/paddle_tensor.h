// A Paddle tensor seen through the C API, for the kernels that the plug-in registers.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "elementwise.h"
#include "paddle/common/enforce.h"
#include "paddle/phi/capi/all.h"
#include "rig.h"

namespace rig {

inline size_t bytes_of(PD_DataType type) {
  switch (type) {
    case PD_DataType::BOOL:
    case PD_DataType::UINT8:
    case PD_DataType::INT8:
      return 1;
    case PD_DataType::UINT16:
    case PD_DataType::INT16:
    case PD_DataType::FLOAT16:
    case PD_DataType::BFLOAT16:
      return 2;
    case PD_DataType::UINT32:
    case PD_DataType::INT32:
    case PD_DataType::FLOAT32:
      return 4;
    case PD_DataType::UINT64:
    case PD_DataType::INT64:
    case PD_DataType::FLOAT64:
    case PD_DataType::COMPLEX64:
      return 8;
    case PD_DataType::COMPLEX128:
      return 16;
    default:
      throw std::runtime_error("rig: tensor of an unknown type");
  }
}

inline void require(PD_Status status, const char* call) {
  if (status != C_SUCCESS) throw std::runtime_error(std::string("rig: ") + call + " failed");
}

// The shape of a tensor, read once. Strides and data are read when asked for.
class TensorView {
 public:
  explicit TensorView(PD_Tensor* tensor) : tensor_(tensor) {
    PD_Status status = C_SUCCESS;
    num_dims = static_cast<int>(PD_TensorGetNumDims(tensor, &status));
    if (num_dims > kMaxDims) throw std::runtime_error("rig: a tensor of more than 9 dimensions");
    for (int d = 0; d < num_dims; ++d) {
      dims[d] = PD_TensorGetDim(tensor, d, &status);
      count *= dims[d];
    }
    type = PD_TensorGetPDDataType(tensor, &status);
    require(status, "reading a tensor's shape");
  }

  int64_t stride(int d) const {
    PD_Status status = C_SUCCESS;
    const int64_t found = PD_TensorGetStride(tensor_, d, &status);
    require(status, "PD_TensorGetStride");
    return found;
  }

  // Null for a tensor without elements, which may have no memory.
  void* data() const {
    PD_Status status = C_SUCCESS;
    void* found = count ? PD_TensorGetDataPointer(tensor_, &status) : nullptr;
    require(status, "PD_TensorGetDataPointer");
    return found;
  }

  void* allocate(PD_DeviceContext* context, PD_DataType as) const {
    PD_Status status = C_SUCCESS;
    void* found = PD_DeviceContextAllocateTensor(context, tensor_, 0, as, &status);
    require(status, "PD_DeviceContextAllocateTensor");
    return found;
  }

  int num_dims = 0;
  int64_t dims[kMaxDims] = {};
  int64_t count = 1;
  PD_DataType type;

 private:
  PD_Tensor* tensor_;
};

inline void* stream_of(PD_DeviceContext* context) {
  PD_Status status = C_SUCCESS;
  void* stream = PD_DeviceContextGetStream(context, &status);
  require(status, "PD_DeviceContextGetStream");
  return stream;
}

// A kernel whose exceptions reach Python: Paddle translates its own, and any other ends the process.
template <auto kernel>
struct Translated;

template <class... Arguments, void (*kernel)(Arguments...)>
struct Translated<kernel> {
  static void call(Arguments... arguments) {
    try {
      kernel(arguments...);
    } catch (const std::exception& error) {
      PADDLE_THROW(common::errors::PreconditionNotMet("%s", error.what()));
    }
  }
};

// Registers one kernel for one dtype: what eager mode calls, with the arguments of Paddle's own
// kernel as pointers. Static programs, which would call it by its context, are refused.
template <auto kernel>
void register_kernel(const char* name, PD_DataType type, size_t num_tensors,
                     std::vector<PD_KernelArgumentType> attributes = {}) {
  std::vector<PD_KernelArgumentType> inputs(1 + num_tensors, PD_ARG_TYPE_TENSOR);
  inputs[0] = PD_ARG_TYPE_CONTEXT;
  PD_KernelArgumentType output = PD_ARG_TYPE_TENSOR;
  const auto by_context = [](PD_KernelContext*) {
    PADDLE_THROW(common::errors::Unimplemented("the rig has kernels for eager mode alone"));
  };
  const auto no_definitions = [](const PD_KernelKey*, PD_Kernel*) {};
  PD_RegisterPhiKernel(name, kDeviceName, type, PD_DataLayout::ALL_LAYOUT, inputs.size(),
                       inputs.data(), attributes.size(), attributes.data(), 1, &output,
                       no_definitions, by_context,
                       reinterpret_cast<void*>(Translated<kernel>::call));
}

}  // namespace rig
