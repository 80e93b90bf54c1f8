// The C ABI of the kernels with host code behind it: what calls them is tested without a GPU.
#include "position_ids.h"
#include "sparse_mla.h"
#include "topk.h"

extern "C" int fd_dsa_position_ids_cuda(const int32_t* seq_lens_decoder,
                                        const int32_t* seq_lens_this_time, int32_t* position_ids,
                                        int32_t num_rows, int32_t num_tokens, void*) {
  fd_dsa::position_ids_cpu(seq_lens_decoder, seq_lens_this_time, position_ids, num_rows,
                           num_tokens);
  return 0;
}

extern "C" int fd_dsa_topk_cuda(const FdDsaTopk* rows, void*) {
  fd_dsa::topk::topk_cpu(*rows);
  return 0;
}

extern "C" int fd_dsa_topk_bytes() { return static_cast<int>(sizeof(FdDsaTopk)); }

extern "C" int fd_dsa_sparse_mla_bytes() { return static_cast<int>(sizeof(FdDsaSparseMla)); }

// Say what they were given by their answer: the caller's numbers are tested, not their result.
extern "C" int fd_dsa_sparse_mla_narrow_cuda(const FdDsaSparseMla* job, void*) {
  const bool has_rows = job->dequantized != nullptr;
  const int32_t numbers[] = {
      job->num_tokens,      job->num_heads,
      job->topk,            job->num_slots,
      job->is_fp8,          job->out_is_bfloat16,
      job->splits,          job->lse != nullptr,
      has_rows,             has_rows ? job->num_rows : 0,
      has_rows ? job->block_size : 0, has_rows ? job->dequantized_slots : 0,
      has_rows ? job->dequantized_blocks[1] : 0, has_rows ? job->is_dequantized[2] : 0,
      has_rows ? job->batch_id_per_token[1] : 0};
  auto* out = static_cast<float*>(job->out);
  *out = job->softmax_scale;
  for (int32_t number : numbers) *++out = static_cast<float>(number);
  return 0;
}

extern "C" int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMla* job, void* stream) {
  return fd_dsa_sparse_mla_narrow_cuda(job, stream);
}

extern "C" const char* fd_dsa_cuda_error(int) { return "no CUDA here"; }
