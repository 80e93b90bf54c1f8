// Paddle operator get_position_ids_and_mask_encoder_batch, with the reduced arguments of
// PaddlePaddle/FastDeploy #7367.
#include "binding.h"
#include "csrc/position_ids.h"

namespace {

constexpr char kOp[] = "get_position_ids_and_mask_encoder_batch";

void position_ids(const paddle::Tensor& seq_lens_encoder, const paddle::Tensor& seq_lens_decoder,
                  const paddle::Tensor& seq_lens_this_time, paddle::Tensor& position_ids) {
  constexpr auto kInt32 = paddle::DataType::INT32;
  const int64_t num_rows = seq_lens_this_time.numel(), num_tokens = position_ids.numel();
  const std::pair<const char*, const paddle::Tensor*> lengths[] = {
      {"seq_lens_encoder", &seq_lens_encoder},
      {"seq_lens_decoder", &seq_lens_decoder},
      {"seq_lens_this_time", &seq_lens_this_time}};
  for (const auto& [name, tensor] : lengths) {
    fd_dsa::check_tensor(kOp, name, *tensor, kInt32, seq_lens_encoder);
    PD_CHECK(tensor->numel() == num_rows, kOp, ": ", name, ": got shape ",
             fd_dsa::shape_of(*tensor), ", seq_lens_this_time has shape ",
             fd_dsa::shape_of(seq_lens_this_time), "; pass one entry for each row in all three");
  }
  fd_dsa::check_tensor(kOp, "position_ids", position_ids, kInt32, seq_lens_encoder);
  fd_dsa::check_range(kOp, "number of rows", num_rows, 0, INT32_MAX);
  fd_dsa::check_range(kOp, "number of position_ids", num_tokens, 0, INT32_MAX);
  if (num_rows == 0 || num_tokens == 0) return;
  const auto* decoder = seq_lens_decoder.data<int32_t>();
  const auto* this_time = seq_lens_this_time.data<int32_t>();
  auto* positions = position_ids.data<int32_t>();
  if (fd_dsa::runs_on_cpu(kOp, position_ids)) {
    fd_dsa::position_ids_cpu(decoder, this_time, positions, num_rows, num_tokens);
    return;
  }
  if constexpr (fd_dsa::kHasCuda) {
    fd_dsa::check_launch(
        kOp, fd_dsa_position_ids_cuda(decoder, this_time, positions, num_rows, num_tokens,
                                      fd_dsa::stream_of(position_ids)));
  }
}

std::vector<std::vector<int64_t>> infer_shape(const std::vector<int64_t>&,
                                              const std::vector<int64_t>&,
                                              const std::vector<int64_t>&,
                                              const std::vector<int64_t>& position_ids) {
  return {position_ids};
}

std::vector<paddle::DataType> infer_dtype(const paddle::DataType&, const paddle::DataType&,
                                          const paddle::DataType&,
                                          const paddle::DataType& position_ids) {
  return {position_ids};
}

}  // namespace

PD_BUILD_OP(get_position_ids_and_mask_encoder_batch)
    .Inputs({"seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "position_ids"})
    .Outputs({"position_ids_out"})
    .SetInplaceMap({{"position_ids", "position_ids_out"}})
    .SetKernelFn(PD_KERNEL(position_ids))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_dtype));
