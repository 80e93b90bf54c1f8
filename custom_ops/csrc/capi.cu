// The launchers of the C ABI. A file of its own for each large operator keeps builds parallel.
#include "position_ids.cuh"
#include "sparse_mla.h"

extern "C" int fd_dsa_position_ids_cuda(const int32_t* seq_lens_decoder,
                                        const int32_t* seq_lens_this_time, int32_t* position_ids,
                                        int32_t num_rows, int32_t num_tokens, void* stream) {
  return fd_dsa::launch_position_ids(seq_lens_decoder, seq_lens_this_time, position_ids, num_rows,
                                     num_tokens, stream);
}

// Name and text of a cudaError_t that a launcher returned.
extern "C" const char* fd_dsa_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Size of a structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_sparse_mla_bytes() { return static_cast<int>(sizeof(FdDsaSparseMla)); }
