// The launcher of sparse MLA for many heads in a unit of its own.
#include "sparse_mla_wide.cuh"

extern "C" int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMlaWide* job, void* stream) {
  return fd_dsa::wide::launch_sparse_mla(*job, stream);
}

// Size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_sparse_mla_wide_bytes() {
  return static_cast<int>(sizeof(FdDsaSparseMlaWide));
}
