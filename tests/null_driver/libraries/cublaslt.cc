// A cuBLASLt that finds one algorithm for each GEMM and multiplies nothing.

#include <cstddef>

#include "launches.h"

namespace {

char object[64];

int give_object(void** out) { return *out = object, 0; }

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return 130000; }
const char* cublasLtGetStatusName(int) { return "null cuBLASLt"; }
int cublasLtCreate(void** handle) { return give_object(handle); }
int cublasLtMatmulPreferenceCreate(void** out) { return give_object(out); }
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }
int cublasLtMatmulDescCreate(void** out, int, int) { return give_object(out); }
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return 0; }
int cublasLtMatrixLayoutCreate(void** out, int, size_t, size_t, size_t) { return give_object(out); }

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*,
                                   int* count) {
  return *count = 1, 0;
}

int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*,
                   const void*, void*, void*, void*, const void*, void*, size_t, void*) {
  return launches++, 0;
}
}
