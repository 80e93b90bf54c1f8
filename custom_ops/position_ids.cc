// The Paddle operator get_position_ids_and_mask_encoder_batch.
//
// Its arguments are the reduced ones of PaddlePaddle/FastDeploy #7367. The operator checks them and
// calls a launcher of csrc/.
#include <string>

#include "csrc/position_ids.h"
#include "paddle/phi/api/ext/op_meta_info.h"

#if defined(PADDLE_WITH_CUSTOM_DEVICE) && !defined(PADDLE_WITH_CUDA)
#include "paddle/phi/backends/context_pool.h"
#endif

extern "C" const char* fd_dsa_cuda_error(int error);

namespace {

using Tensor = paddle::Tensor;
constexpr char kOp[] = "get_position_ids_and_mask_encoder_batch";

// Support of GPU memory in this library.
#if defined(PADDLE_WITH_CUDA) || defined(PADDLE_WITH_CUSTOM_DEVICE)
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Returns the shape of a tensor as text: [2, 3].
std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.shape()) {
    text += (text.empty() ? "[" : ", ") + std::to_string(size);
  }
  return text.empty() ? "[]" : text + "]";
}

// Rejects a tensor that is not int32, that is too large or that is not on the place of the first.
void check_tensor(const char* name, const Tensor& tensor, const Tensor& first) {
  constexpr auto kInt32 = paddle::DataType::INT32;
  PD_CHECK(tensor.dtype() == kInt32, kOp, ": ", name, ": got dtype ", tensor.dtype(),
           ", allowed is ", kInt32, "; convert it");
  PD_CHECK(tensor.place() == first.place(), kOp, ": ", name, ": is on ", tensor.place(),
           ", the first tensor on ", first.place(), "; put all of them in one place");
  PD_CHECK(tensor.numel() <= INT32_MAX, kOp, ": ", name, ": got ", tensor.numel(),
           " entries, allowed are at most ", INT32_MAX);
}

// Returns true for host memory, and rejects memory without kernels in this library.
bool runs_on_cpu(const Tensor& tensor) {
  if (tensor.is_cpu()) return true;
#if defined(PADDLE_WITH_CUDA)
  const bool is_device = tensor.is_gpu();
#else
  const bool is_device = kHasCuda && tensor.is_custom_device();
#endif
  PD_CHECK(is_device, kOp, ": the tensors are on ", tensor.place(),
           ", but this build of fd_dsa_ops has kernels for ",
           kHasCuda ? "host memory and its GPU" : "host memory alone",
           "; build it beside a Paddle that has CUDA, where there is nvcc");
  return false;
}

// Returns the stream of the tensor's device on which Paddle queues its own work.
void* stream_of(const Tensor& tensor) {
#if defined(PADDLE_WITH_CUDA)
  return static_cast<void*>(tensor.stream());
#elif defined(PADDLE_WITH_CUSTOM_DEVICE)
  auto* context = phi::DeviceContextPool::Instance().Get(tensor.place());
  return static_cast<phi::CustomContext*>(context)->stream();
#else
  return nullptr;
#endif
}

void position_ids(const Tensor& seq_lens_encoder, const Tensor& seq_lens_decoder,
                  const Tensor& seq_lens_this_time, Tensor& position_ids) {
  const int64_t num_rows = seq_lens_this_time.numel(), num_tokens = position_ids.numel();
  const std::pair<const char*, const Tensor*> lengths[] = {
      {"seq_lens_encoder", &seq_lens_encoder},
      {"seq_lens_decoder", &seq_lens_decoder},
      {"seq_lens_this_time", &seq_lens_this_time}};
  for (const auto& [name, tensor] : lengths) {
    check_tensor(name, *tensor, seq_lens_encoder);
    PD_CHECK(tensor->numel() == num_rows, kOp, ": ", name, ": got shape ", shape_of(*tensor),
             ", seq_lens_this_time has shape ", shape_of(seq_lens_this_time),
             "; pass one entry for each row in all three");
  }
  check_tensor("position_ids", position_ids, seq_lens_encoder);
  if (num_rows == 0 || num_tokens == 0) return;
  const auto* decoder = seq_lens_decoder.data<int32_t>();
  const auto* this_time = seq_lens_this_time.data<int32_t>();
  auto* positions = position_ids.data<int32_t>();
  if (runs_on_cpu(position_ids)) {
    fd_dsa::position_ids_cpu(decoder, this_time, positions, num_rows, num_tokens);
    return;
  }
  if constexpr (kHasCuda) {
    const int error = fd_dsa_position_ids_cuda(decoder, this_time, positions, num_rows,
                                               num_tokens, stream_of(position_ids));
    PD_CHECK(error == 0, kOp, ": the kernel cannot be launched: ", fd_dsa_cuda_error(error), " (",
             error, ")");
  }
}

using Shape = std::vector<int64_t>;
using Type = paddle::DataType;

std::vector<Shape> infer_shape(const Shape&, const Shape&, const Shape&, const Shape& positions) {
  return {positions};
}

std::vector<Type> infer_dtype(const Type&, const Type&, const Type&, const Type& positions) {
  return {positions};
}

}  // namespace

PD_BUILD_OP(get_position_ids_and_mask_encoder_batch)
    .Inputs({"seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "position_ids"})
    .Outputs({"position_ids_out"})
    .SetInplaceMap({{"position_ids", "position_ids_out"}})
    .SetKernelFn(PD_KERNEL(position_ids))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_dtype));
