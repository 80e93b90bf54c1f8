// Paddle operator fd_dsa_step_metadata: all arrays of a step, in place.
#include "binding.h"
#include "csrc/step_metadata.h"

namespace {

constexpr char kOp[] = "fd_dsa_step_metadata";
constexpr auto kInt32 = paddle::DataType::INT32;
constexpr auto kInt64 = paddle::DataType::INT64;
using Tensor = paddle::Tensor;
using MaybeTensor = paddle::optional<paddle::Tensor>;

// Checks the inputs; fills in what the kernels read.
void take_inputs(FdDsaStep& step, const Tensor& encoder, const Tensor& decoder,
                 const Tensor& this_time, const Tensor& tables) {
  const int64_t rows = this_time.numel();
  const std::pair<const char*, const Tensor*> lengths[] = {{"seq_lens_encoder", &encoder},
                                                           {"seq_lens_decoder", &decoder},
                                                           {"seq_lens_this_time", &this_time}};
  for (const auto& [name, tensor] : lengths) {
    fd_dsa::check_tensor(kOp, name, *tensor, kInt32, encoder);
    fd_dsa::check_vector(kOp, name, *tensor, rows, "rows of seq_lens_this_time");
  }
  fd_dsa::check_tensor(kOp, "block_tables", tables, kInt32, encoder);
  PD_CHECK(tables.shape().size() == 2 && tables.shape()[0] == rows, kOp,
           ": block_tables: got shape ", fd_dsa::shape_of(tables), ", allowed is [", rows,
           ", blocks of a row] (seq_lens_this_time has shape ", fd_dsa::shape_of(this_time), ")");
  fd_dsa::check_range(kOp, "number of rows", rows, 0, INT32_MAX);
  fd_dsa::check_range(kOp, "number of columns", tables.shape()[1], 0, INT32_MAX);
  step.seq_lens_encoder = encoder.data<int32_t>();
  step.seq_lens_decoder = decoder.data<int32_t>();
  step.seq_lens_this_time = this_time.data<int32_t>();
  step.block_tables = tables.data<int32_t>();
  step.num_rows = static_cast<int32_t>(rows);
  step.num_columns = static_cast<int32_t>(tables.shape()[1]);
  step.row_stride = step.num_columns;
}

// Pointer of a checked output.
template <typename T>
T* output(const char* name, Tensor& tensor, paddle::DataType dtype, int64_t size,
          const char* what, const Tensor& first) {
  fd_dsa::check_tensor(kOp, name, tensor, dtype, first);
  fd_dsa::check_vector(kOp, name, tensor, size, what);
  return tensor.data<T>();
}

void step_metadata(const Tensor& seq_lens_encoder, const Tensor& seq_lens_decoder,
                   const Tensor& seq_lens_this_time, const Tensor& block_tables,
                   Tensor& batch_id_per_token, Tensor& position_ids, Tensor& slot_mapping,
                   Tensor& cu_seqlens_q, Tensor& cache_seqlens, MaybeTensor& position_ids_int32,
                   MaybeTensor& indexer_attn_mask_offsets, MaybeTensor& cu_seqlens_kg,
                   int block_size, int64_t num_blocks) {
  FdDsaStep step = {};
  const Tensor& first = seq_lens_encoder;
  take_inputs(step, first, seq_lens_decoder, seq_lens_this_time, block_tables);
  fd_dsa::check_range(kOp, "block_size", block_size, 1, INT32_MAX);
  fd_dsa::check_range(kOp, "num_blocks (0 = no bound)", num_blocks, 0, INT32_MAX);
  const int64_t tokens = batch_id_per_token.numel(), rows = cache_seqlens.numel();
  fd_dsa::check_range(kOp, "number of tokens", tokens, 0, INT32_MAX / 2);
  fd_dsa::check_range(kOp, "number of cache_seqlens", rows, step.num_rows, INT32_MAX - 1);
  const char* kTokens = "tokens of batch_id_per_token";
  const char* kRows = "entries of cache_seqlens";
  const char* kBounds = "entries of cache_seqlens + 1";
  step.batch_id_per_token =
      output<int32_t>("batch_id_per_token", batch_id_per_token, kInt32, tokens, kTokens, first);
  step.position_ids =
      output<int64_t>("position_ids", position_ids, kInt64, tokens, kTokens, first);
  step.slot_mapping =
      output<int64_t>("slot_mapping", slot_mapping, kInt64, tokens, kTokens, first);
  step.cu_seqlens_q =
      output<int32_t>("cu_seqlens_q", cu_seqlens_q, kInt32, rows + 1, kBounds, first);
  step.cache_seqlens =
      output<int32_t>("cache_seqlens", cache_seqlens, kInt32, rows, kRows, first);
  if (position_ids_int32) {
    step.position_ids_int32 =
        output<int32_t>("position_ids_int32", *position_ids_int32, kInt32, tokens, kTokens, first);
  }
  PD_CHECK(static_cast<bool>(indexer_attn_mask_offsets) == static_cast<bool>(cu_seqlens_kg), kOp,
           ": indexer_attn_mask_offsets and cu_seqlens_kg: got one of them, allowed are both (a ",
           "step with prefill rows) or none");
  if (indexer_attn_mask_offsets) {
    step.indexer_attn_mask_offsets =
        output<int32_t>("indexer_attn_mask_offsets", *indexer_attn_mask_offsets, kInt32,
                        2 * tokens, "2 * tokens of batch_id_per_token", first);
    step.cu_seqlens_kg =
        output<int32_t>("cu_seqlens_kg", *cu_seqlens_kg, kInt32, rows + 1, kBounds, first);
  }
  step.num_padded_rows = static_cast<int32_t>(rows);
  step.num_padded_tokens = static_cast<int32_t>(tokens);
  step.block_size = block_size;
  step.last_block = num_blocks == 0 ? INT32_MAX : static_cast<int32_t>(num_blocks - 1);
  if (fd_dsa::runs_on_cpu(kOp, cu_seqlens_q)) {
    fd_dsa::step_metadata_cpu(step);
    return;
  }
  if constexpr (fd_dsa::kHasCuda) {
    fd_dsa::check_launch(kOp, fd_dsa_step_metadata_cuda(&step, fd_dsa::stream_of(cu_seqlens_q)));
  }
}

using Shape = std::vector<int64_t>;
using MaybeShape = paddle::optional<Shape>;

std::vector<Shape> infer_shape(const Shape&, const Shape&, const Shape&, const Shape&,
                               const Shape& batch_id_per_token, const Shape& position_ids,
                               const Shape& slot_mapping, const Shape& cu_seqlens_q,
                               const Shape& cache_seqlens, const MaybeShape& position_ids_int32,
                               const MaybeShape& indexer_attn_mask_offsets,
                               const MaybeShape& cu_seqlens_kg) {
  const auto shape_or_none = [](const MaybeShape& shape) { return shape ? *shape : Shape{}; };
  return {batch_id_per_token,
          position_ids,
          slot_mapping,
          cu_seqlens_q,
          cache_seqlens,
          shape_or_none(position_ids_int32),
          shape_or_none(indexer_attn_mask_offsets),
          shape_or_none(cu_seqlens_kg)};
}

using Type = paddle::DataType;
using MaybeType = paddle::optional<paddle::DataType>;

std::vector<Type> infer_dtype(const Type&, const Type&, const Type&, const Type&, const Type&,
                              const Type&, const Type&, const Type&, const Type&, const MaybeType&,
                              const MaybeType&, const MaybeType&) {
  return {kInt32, kInt64, kInt64, kInt32, kInt32, kInt32, kInt32, kInt32};
}

}  // namespace

PD_BUILD_OP(fd_dsa_step_metadata)
    .Inputs({"seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables",
             "batch_id_per_token", "position_ids", "slot_mapping", "cu_seqlens_q", "cache_seqlens",
             paddle::Optional("position_ids_int32"), paddle::Optional("indexer_attn_mask_offsets"),
             paddle::Optional("cu_seqlens_kg")})
    .Outputs({"batch_id_per_token_out", "position_ids_out", "slot_mapping_out", "cu_seqlens_q_out",
              "cache_seqlens_out", paddle::Optional("position_ids_int32_out"),
              paddle::Optional("indexer_attn_mask_offsets_out"),
              paddle::Optional("cu_seqlens_kg_out")})
    .Attrs({"block_size: int", "num_blocks: int64_t"})
    .SetInplaceMap(
        {{"batch_id_per_token", "batch_id_per_token_out"},
         {"position_ids", "position_ids_out"},
         {"slot_mapping", "slot_mapping_out"},
         {"cu_seqlens_q", "cu_seqlens_q_out"},
         {"cache_seqlens", "cache_seqlens_out"},
         {paddle::Optional("position_ids_int32"), paddle::Optional("position_ids_int32_out")},
         {paddle::Optional("indexer_attn_mask_offsets"),
          paddle::Optional("indexer_attn_mask_offsets_out")},
         {paddle::Optional("cu_seqlens_kg"), paddle::Optional("cu_seqlens_kg_out")}})
    .SetKernelFn(PD_KERNEL(step_metadata))
    .SetInferShapeFn(PD_INFER_SHAPE(infer_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(infer_dtype));
