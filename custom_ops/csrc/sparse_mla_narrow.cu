// The launcher of sparse MLA for few heads in a unit of its own.
#include "sparse_mla_narrow.cuh"

extern "C" int fd_dsa_sparse_mla_narrow_cuda(const FdDsaSparseMla* job, void* stream) {
  return fd_dsa::narrow::launch_narrow(*job, stream);
}
