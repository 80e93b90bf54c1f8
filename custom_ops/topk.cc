// Paddle operators fd_dsa_topk, of positions, and fd_dsa_topk_slots, of slots of a paged cache.
#include "binding.h"
#include "csrc/topk.h"

namespace {

constexpr char kPositions[] = "fd_dsa_topk";
constexpr char kSlots[] = "fd_dsa_topk_slots";
constexpr auto kInt32 = paddle::DataType::INT32;
using Tensor = paddle::Tensor;

void check_matrix(const char* op, const char* name, const Tensor& tensor) {
  PD_CHECK(tensor.shape().size() == 2, op, ": ", name, ": got shape ", fd_dsa::shape_of(tensor),
           ", allowed are two dimensions");
  fd_dsa::check_range(op, name, tensor.shape()[0], 0, INT32_MAX);
  fd_dsa::check_range(op, name, tensor.shape()[1], 0, INT32_MAX);
}

// Checks the scores and fills in what is known from them.
FdDsaTopk take_scores(const char* op, const Tensor& logits) {
  fd_dsa::check_tensor(op, "logits", logits, paddle::DataType::FLOAT32, logits);
  check_matrix(op, "logits", logits);
  FdDsaTopk rows = {};
  rows.logits = logits.data<float>();
  rows.num_rows = static_cast<int32_t>(logits.shape()[0]);
  rows.width = static_cast<int32_t>(logits.shape()[1]);
  rows.row_stride = rows.width;
  return rows;
}

void choose(const char* op, const FdDsaTopk& rows, const Tensor& first) {
  if (rows.num_rows == 0 || rows.k == 0) return;
  if (fd_dsa::runs_on_cpu(op, first)) {
    fd_dsa::topk::topk_cpu(rows);
    return;
  }
  if constexpr (fd_dsa::kHasCuda) {
    fd_dsa::check_launch(op, fd_dsa_topk_cuda(&rows, fd_dsa::stream_of(first)));
  }
}

// Checks where the choice goes and fills it in.
void take_out(const char* op, FdDsaTopk& rows, const char* name, Tensor& out,
              const Tensor& first) {
  fd_dsa::check_tensor(op, name, out, kInt32, first);
  check_matrix(op, name, out);
  rows.out = out.data<int32_t>();
  rows.k = static_cast<int32_t>(out.shape()[1]);
}

void topk(const Tensor& logits, const Tensor& lengths, Tensor& positions) {
  FdDsaTopk rows = take_scores(kPositions, logits);
  fd_dsa::check_tensor(kPositions, "lengths", lengths, kInt32, logits);
  fd_dsa::check_vector(kPositions, "lengths", lengths, rows.num_rows, "rows of logits");
  rows.lengths = lengths.data<int32_t>();
  take_out(kPositions, rows, "positions", positions, logits);
  PD_CHECK(positions.shape()[0] == rows.num_rows, kPositions, ": positions: got shape ",
           fd_dsa::shape_of(positions), ", allowed is [", rows.num_rows, ", k] (logits has shape ",
           fd_dsa::shape_of(logits), ")");
  choose(kPositions, rows, logits);
}

void topk_slots(const Tensor& logits, const Tensor& position_ids, const Tensor& batch_ids,
                const Tensor& block_tables, Tensor& slots, int block_size, int num_blocks,
                int first_token, int num_rows) {
  FdDsaTopk rows = take_scores(kSlots, logits);
  take_out(kSlots, rows, "slots", slots, logits);
  const int64_t tokens = slots.shape()[0];
  fd_dsa::check_tensor(kSlots, "position_ids", position_ids, paddle::DataType::INT64, logits);
  fd_dsa::check_vector(kSlots, "position_ids", position_ids, tokens, "tokens of slots");
  fd_dsa::check_tensor(kSlots, "batch_id_per_token", batch_ids, kInt32, logits);
  fd_dsa::check_vector(kSlots, "batch_id_per_token", batch_ids, tokens, "tokens of slots");
  fd_dsa::check_tensor(kSlots, "block_tables", block_tables, kInt32, logits);
  check_matrix(kSlots, "block_tables", block_tables);
  fd_dsa::check_range(kSlots, "block_size", block_size, 1, INT32_MAX);
  fd_dsa::check_range(kSlots, "num_blocks", num_blocks, 0, INT32_MAX / block_size);
  fd_dsa::check_range(kSlots, "num_rows (-1 = those of logits)", num_rows, -1, tokens);
  if (num_rows >= 0) rows.num_rows = num_rows;
  fd_dsa::check_range(kSlots, "rows behind first_token", rows.num_rows, 0, tokens);
  fd_dsa::check_range(kSlots, "first_token", first_token, 0, tokens - rows.num_rows);
  rows.position_ids = position_ids.data<int64_t>();
  rows.batch_ids = batch_ids.data<int32_t>();
  rows.block_tables = block_tables.data<int32_t>();
  rows.first_token = first_token;
  rows.table_width = static_cast<int32_t>(block_tables.shape()[1]);
  rows.block_size = block_size;
  rows.num_blocks = num_blocks;
  choose(kSlots, rows, logits);
}

using Shape = std::vector<int64_t>;
using Type = paddle::DataType;

std::vector<Shape> positions_shape(const Shape&, const Shape&, const Shape& positions) {
  return {positions};
}

std::vector<Type> positions_dtype(const Type&, const Type&, const Type&) { return {kInt32}; }

std::vector<Shape> slots_shape(const Shape&, const Shape&, const Shape&, const Shape&,
                               const Shape& slots) {
  return {slots};
}

std::vector<Type> slots_dtype(const Type&, const Type&, const Type&, const Type&, const Type&) {
  return {kInt32};
}

}  // namespace

PD_BUILD_OP(fd_dsa_topk)
    .Inputs({"logits", "lengths", "positions"})
    .Outputs({"positions_out"})
    .SetInplaceMap({{"positions", "positions_out"}})
    .SetKernelFn(PD_KERNEL(topk))
    .SetInferShapeFn(PD_INFER_SHAPE(positions_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(positions_dtype));

PD_BUILD_OP(fd_dsa_topk_slots)
    .Inputs({"logits", "position_ids", "batch_id_per_token", "block_tables", "slots"})
    .Attrs({"block_size: int", "num_blocks: int", "first_token: int", "num_rows: int"})
    .Outputs({"slots_out"})
    .SetInplaceMap({{"slots", "slots_out"}})
    .SetKernelFn(PD_KERNEL(topk_slots))
    .SetInferShapeFn(PD_INFER_SHAPE(slots_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(slots_dtype));
