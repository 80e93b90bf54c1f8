// The C ABI of the kernels with host code behind it: what calls them is tested without a GPU.
#include "position_ids.h"
#include "step_metadata.h"
#include "topk.h"

extern "C" int fd_dsa_step_metadata_cuda(const FdDsaStep* step, void*) {
  fd_dsa::step_metadata_cpu(*step);
  return 0;
}

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

extern "C" int fd_dsa_step_bytes() { return static_cast<int>(sizeof(FdDsaStep)); }

extern "C" const char* fd_dsa_cuda_error(int) { return "no CUDA here"; }
