// Kernels that spare Paddle's fallback through the host: what a model's dense layers use most.
//
// They compute in float32 and take float32 and bfloat16; everything else goes on through the
// fallback. Signatures are those of paddle/phi/kernels/*_kernel.h with pointers for references.

#include <cstring>

#include "paddle_tensor.h"

namespace rig {
namespace {

Element element_of(PD_DataType type) {
  return type == PD_DataType::BFLOAT16 ? Element::bfloat16 : Element::float32;
}

// Strides of an operand under NumPy's broadcasting: 0 along the axes that it does not have.
void broadcast(const TensorView& operand, const TensorView& out, int64_t* strides) {
  int64_t stride = 1;
  for (int d = operand.num_dims - 1; d >= 0; --d) {
    strides[d + out.num_dims - operand.num_dims] = operand.dims[d] == 1 ? 0 : stride;
    stride *= operand.dims[d];
  }
}

template <BinaryOp op>
void elementwise(PD_DeviceContext* context, PD_Tensor* x, PD_Tensor* y, PD_Tensor* result) {
  counters.op_kernels++;
  const TensorView a(x), b(y), out(result);
  Walk walk;
  walk.num_dims = out.num_dims;
  for (int d = 0; d < out.num_dims; ++d) walk.dims[d] = out.dims[d];
  broadcast(a, out, walk.strides_a);
  broadcast(b, out, walk.strides_b);
  void* memory = out.allocate(context, a.type);
  binary(op, element_of(a.type), a.data(), b.data(), memory, walk, out.count, stream_of(context));
}

void silu_kernel(PD_DeviceContext* context, PD_Tensor* x, PD_Tensor* result) {
  counters.op_kernels++;
  const TensorView a(x), out(result);
  silu(element_of(a.type), a.data(), out.allocate(context, a.type), a.count, stream_of(context));
}

void assign(PD_DeviceContext* context, PD_Tensor* x, PD_Tensor* result) {
  counters.op_kernels++;
  const TensorView a(x), out(result);
  void* memory = out.allocate(context, a.type);
  copy_dense(a.data(), memory, a.count * bytes_of(a.type), stream_of(context));
}

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

uint64_t bits_of(PD_Scalar* value, PD_DataType type) {
  switch (type) {
    case PD_DataType::FLOAT32:
      return bits_of(PD_ScalarGetFloat32Data(value));
    case PD_DataType::FLOAT64:
      return bits_of(PD_ScalarGetFloat64Data(value));
    case PD_DataType::BFLOAT16:
      return bits_of(phi::dtype::bfloat16(PD_ScalarGetFloat32Data(value)).x);
    case PD_DataType::BOOL:
      return PD_ScalarGetBoolData(value);
    default:
      return bits_of(PD_ScalarGetInt64Data(value));
  }
}

void full(PD_DeviceContext* context, void*, PD_Scalar* value, int, PD_Tensor* result) {
  counters.op_kernels++;
  const TensorView out(result);
  void* memory = out.allocate(context, out.type);
  fill(memory, bits_of(value, out.type), out.count, bytes_of(out.type), stream_of(context));
}

// Number of matrices before the last two axes.
int64_t batch_of(const TensorView& x) {
  int64_t batch = 1;
  for (int d = 0; d < x.num_dims - 2; ++d) batch *= x.dims[d];
  return batch;
}

// Which matrix of `x` belongs to matrix `index` of `out`; axes of extent 1 repeat.
int64_t matrix_of(const TensorView& x, const TensorView& out, int64_t index) {
  int64_t found = 0, stride = 1;
  for (int d = out.num_dims - 3, e = x.num_dims - 3; e >= 0; --d, --e) {
    if (x.dims[e] > 1) found += index % out.dims[d] * stride;
    index /= out.dims[d];
    stride *= x.dims[e];
  }
  return found;
}

void matmul_kernel(PD_DeviceContext* context, PD_Tensor* x, PD_Tensor* y, bool transpose_x,
                   bool transpose_y, PD_Tensor* result) {
  counters.op_kernels++;
  const TensorView a(x), b(y), out(result);
  void* memory = out.allocate(context, a.type);
  if (out.count == 0) return;
  // a vector on the left is one row, on the right one column
  const int64_t rows_a = a.num_dims < 2 ? 1 : a.dims[a.num_dims - 2];
  const int64_t columns_a = a.dims[a.num_dims - 1];
  const int64_t rows_b = b.num_dims < 2 ? b.dims[0] : b.dims[b.num_dims - 2];
  const int64_t columns_b = b.num_dims < 2 ? 1 : b.dims[b.num_dims - 1];
  MatmulShape shape;
  shape.transpose_a = transpose_x && a.num_dims > 1;
  shape.transpose_b = transpose_y && b.num_dims > 1;
  shape.m = shape.transpose_a ? columns_a : rows_a;
  shape.k = shape.transpose_a ? rows_a : columns_a;
  shape.n = shape.transpose_b ? rows_b : columns_b;
  const int64_t batch_a = batch_of(a), batch_b = batch_of(b);
  shape.batch = batch_a > batch_b ? batch_a : batch_b;
  if (batch_b == 1 && !shape.transpose_a) {
    // one matrix on the right: all rows on the left are one tall matrix
    shape.m *= batch_a;
    shape.batch = 1;
  }
  const bool each_fits = (batch_a == 1 || batch_a == batch_b || batch_b == 1) &&
                         shape.batch * shape.m * shape.n == out.count;
  if (!each_fits) {
    // batches that broadcast against each other: one GEMM a matrix of the result
    const size_t size = bytes_of(a.type);
    shape.batch = 1;
    shape.batch_stride_a = shape.batch_stride_b = 0;
    for (int64_t i = 0; i < batch_of(out); ++i) {
      const auto* left = static_cast<const char*>(a.data());
      const auto* right = static_cast<const char*>(b.data());
      matmul(element_of(a.type), shape, left + matrix_of(a, out, i) * rows_a * columns_a * size,
             right + matrix_of(b, out, i) * rows_b * columns_b * size,
             static_cast<char*>(memory) + i * shape.m * shape.n * size, stream_of(context));
    }
    return;
  }
  shape.batch_stride_a = batch_a > 1 ? rows_a * columns_a : 0;
  shape.batch_stride_b = batch_b > 1 ? rows_b * columns_b : 0;
  matmul(element_of(a.type), shape, a.data(), b.data(), memory, stream_of(context));
}

}  // namespace

void register_op_kernels() {
  for (const PD_DataType type : {PD_DataType::FLOAT32, PD_DataType::BFLOAT16}) {
    register_kernel<elementwise<BinaryOp::add>>("add", type, 2);
    register_kernel<elementwise<BinaryOp::subtract>>("subtract", type, 2);
    register_kernel<elementwise<BinaryOp::multiply>>("multiply", type, 2);
    register_kernel<elementwise<BinaryOp::divide>>("divide", type, 2);
    register_kernel<silu_kernel>("silu", type, 1);
    register_kernel<matmul_kernel>("matmul", type, 2, {PD_ARG_TYPE_BOOL, PD_ARG_TYPE_BOOL});
  }
  for (const PD_DataType type :
       {PD_DataType::BOOL, PD_DataType::UINT8, PD_DataType::INT8, PD_DataType::INT16,
        PD_DataType::INT32, PD_DataType::INT64, PD_DataType::BFLOAT16, PD_DataType::FLOAT32,
        PD_DataType::FLOAT64}) {
    register_kernel<assign>("assign", type, 1);
    register_kernel<full>("full", type, 0,
                          {PD_ARG_TYPE_INT_ARRAY, PD_ARG_TYPE_SCALAR, PD_ARG_TYPE_DATA_TYPE});
  }
}

}  // namespace rig
