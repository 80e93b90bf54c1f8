// The two kernels that Paddle asks of every device for tensors with strides.

#include "paddle_tensor.h"

namespace rig {
namespace {

const PD_DataType kAllTypes[] = {
    PD_DataType::BOOL,    PD_DataType::UINT8,    PD_DataType::INT8,    PD_DataType::INT16,
    PD_DataType::INT32,   PD_DataType::INT64,    PD_DataType::FLOAT16, PD_DataType::BFLOAT16,
    PD_DataType::FLOAT32, PD_DataType::FLOAT64,  PD_DataType::COMPLEX64};

void set_geometry(PD_Tensor* tensor, int num_dims, const int64_t* dims, const int64_t* strides,
                  int64_t offset) {
  PD_Status status = C_SUCCESS;
  PD_TensorSetDims(tensor, num_dims, dims, &status);
  PD_TensorSetStrides(tensor, num_dims, strides, &status);
  PD_TensorSetOffset(tensor, offset, &status);
  require(status, "setting a tensor's geometry");
}

// A dense copy of a tensor with any strides.
void contiguous(PD_DeviceContext* context, PD_Tensor* x, PD_Tensor* out) {
  counters.op_kernels++;
  const TensorView source(x);
  Walk walk;
  walk.num_dims = source.num_dims;
  int64_t stride = 1;
  for (int d = source.num_dims - 1; d >= 0; --d) {
    walk.dims[d] = source.dims[d];
    walk.strides_a[d] = source.stride(d);
    walk.strides_b[d] = stride;
    stride *= source.dims[d];
  }
  set_geometry(out, source.num_dims, source.dims, walk.strides_b, 0);
  void* dense = TensorView(out).allocate(context, source.type);
  if (source.count) {
    copy_strided(source.data(), dense, walk, source.count, bytes_of(source.type),
                 stream_of(context));
  }
}

// Writes a tensor into a view with strides of memory that is there; one element fills the view.
void strided_copy(PD_DeviceContext* context, PD_Tensor* x, const std::vector<int64_t>* dims,
                  const std::vector<int64_t>* strides, int64_t offset, PD_Tensor* out) {
  counters.op_kernels++;
  const TensorView source(x);
  PD_Status status = C_SUCCESS;
  PD_TensorSetDataType(out, source.type, &status);
  require(status, "PD_TensorSetDataType");
  set_geometry(out, static_cast<int>(dims->size()), dims->data(), strides->data(), offset);
  const TensorView target(out);
  Walk walk;
  walk.num_dims = target.num_dims;
  for (int d = 0; d < target.num_dims; ++d) {
    walk.dims[d] = target.dims[d];
    walk.strides_a[d] = source.count == 1 ? 0 : source.stride(d);
    walk.strides_b[d] = (*strides)[d];
  }
  if (target.count) {
    copy_strided(source.data(), target.data(), walk, target.count, bytes_of(source.type),
                 stream_of(context));
  }
}

}  // namespace

void register_view_kernels() {
  for (const PD_DataType type : kAllTypes) {
    register_kernel<contiguous>("contiguous", type, 1);
    register_kernel<strided_copy>(
        "strided_copy", type, 1,
        {PD_ARG_TYPE_LIST_INT64, PD_ARG_TYPE_LIST_INT64, PD_ARG_TYPE_INT64});
  }
}

}  // namespace rig
