// The kernels of custom_ops/, which do nothing.

#include "all_reduce.h"
#include "expert_gemm.h"
#include "expert_gemm_fp4.h"
#include "expert_gemm_w4a16.h"
#include "launches.h"
#include "sparse_mla.h"
#include "topk.h"
#include "v4_attend.h"

extern "C" {

const char* fd_dsa_cuda_error(int) { return "null kernels"; }

int fd_dsa_all_reduce_cuda(const FdDsaAllReduce*, void*) { return launches++, 0; }
int64_t fd_dsa_all_reduce_memory(int, int) { return 1 << 20; }
int fd_dsa_all_reduce_bytes() { return sizeof(FdDsaAllReduce); }

int fd_dsa_expert_gemm_cuda(const FdDsaExpertGemm*, void*) { return launches++, 0; }
int fd_dsa_expert_gemm_bytes() { return sizeof(FdDsaExpertGemm); }

int fd_dsa_expert_gemm_fp4_cuda(const FdDsaExpertGemmFp4*, void*) { return launches++, 0; }
int fd_dsa_expert_gemm_fp4_bytes() { return sizeof(FdDsaExpertGemmFp4); }
int fd_dsa_expert_gemm_w4a16_cuda(const FdDsaExpertGemmW4a16*, void*) { return launches++, 0; }
int fd_dsa_expert_gemm_w4a16_bytes() { return sizeof(FdDsaExpertGemmW4a16); }

int fd_dsa_sparse_mla_narrow_cuda(const FdDsaSparseMla*, void*) { return launches++, 0; }
int fd_dsa_sparse_mla_wide_cuda(const FdDsaSparseMla*, void*) { return launches++, 0; }
int fd_dsa_sparse_mla_bytes() { return sizeof(FdDsaSparseMla); }

int fd_dsa_topk_cuda(const FdDsaTopk*, void*) { return launches++, 0; }
int fd_dsa_topk_bytes() { return sizeof(FdDsaTopk); }

int fd_dsa_v4_attend_cuda(const FdDsaV4Attend*, void*) { return launches++, 0; }
int fd_dsa_v4_attend_bytes() { return sizeof(FdDsaV4Attend); }
}
