// The launcher of top-k in a unit of its own.
#include "topk.cuh"

extern "C" int fd_dsa_topk_cuda(const FdDsaTopk* rows, void* stream) {
  return fd_dsa::topk::launch_topk(*rows, stream);
}

extern "C" int fd_dsa_topk_bytes() { return static_cast<int>(sizeof(FdDsaTopk)); }
