// The launcher of sparse MLA for many heads in a unit of its own.
#include "sparse_mla_wide.cuh"

extern "C" int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMla* job, void* stream) {
  return fd_dsa::wide::launch_wide(*job, stream);
}
