// Matrix products by cuBLAS, opened at first use: a build needs no cuBLAS, nor does a test without
// products. RIG_CUBLAS may name the library; rig.py sets it where the loader would not find one.

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "elementwise.h"

namespace rig {
namespace {

// values of cuBLAS's and CUDA's public enums
constexpr int kNoTranspose = 0, kTranspose = 1;
constexpr int kReal32 = 0, kRealBf16 = 14;
// CUBLAS_COMPUTE_32F, and its pedantic form: never TF32, whatever the environment asks for
constexpr int kCompute32 = 68, kCompute32Pedantic = 69;
constexpr int kDefaultAlgorithm = -1;

using Create = int (*)(void**);
using SetStream = int (*)(void*, void*);
using GemmStridedBatched = int (*)(void*, int, int, int, int, int, const void*, const void*, int,
                                   int, long long, const void*, int, int, long long, const void*,
                                   void*, int, int, long long, int, int, int);

void require(int status, const char* call) {
  if (status != 0) {
    throw std::runtime_error(std::string(call) + ": status " + std::to_string(status));
  }
}

class Cublas {
 public:
  Cublas() {
    const char* named = std::getenv("RIG_CUBLAS");
    const std::string path = named ? named : "libcublas.so.13";
    // its other half is beside it, where the loader may not look; what is loaded is found
    std::string half = path;
    dlopen(half.replace(half.rfind("libcublas"), 9, "libcublasLt").c_str(), RTLD_NOW);
    void* library = dlopen(path.c_str(), RTLD_NOW);
    if (library == nullptr) throw std::runtime_error(std::string("rig matmul: ") + dlerror());
    set_stream_ = reinterpret_cast<SetStream>(symbol(library, "cublasSetStream_v2"));
    gemm_ =
        reinterpret_cast<GemmStridedBatched>(symbol(library, "cublasGemmStridedBatchedEx"));
    require(reinterpret_cast<Create>(symbol(library, "cublasCreate_v2"))(&handle_),
            "cublasCreate");
  }

  void multiply(Element element, const MatmulShape& s, const void* a, const void* b, void* c,
                void* stream) {
    // one handle for all threads, and the stream is its state
    std::lock_guard<std::mutex> lock(mutex_);
    require(set_stream_(handle_, stream), "cublasSetStream");
    const bool is_float32 = element == Element::float32;
    const int type = is_float32 ? kReal32 : kRealBf16;
    const int compute = is_float32 ? kCompute32Pedantic : kCompute32;
    const float one = 1, zero = 0;
    // cuBLAS is column-major: row-major c = a b is its c^T = b^T a^T
    const int leading_b = s.transpose_b ? s.k : s.n, leading_a = s.transpose_a ? s.m : s.k;
    require(gemm_(handle_, s.transpose_b ? kTranspose : kNoTranspose,
                  s.transpose_a ? kTranspose : kNoTranspose, s.n, s.m, s.k, &one, b, type,
                  leading_b, s.batch_stride_b, a, type, leading_a, s.batch_stride_a, &zero, c,
                  type, s.n, s.m * s.n, s.batch, compute, kDefaultAlgorithm),
            "cublasGemmStridedBatchedEx");
  }

 private:
  static void* symbol(void* library, const char* name) {
    void* found = dlsym(library, name);
    if (found == nullptr) throw std::runtime_error(std::string("rig matmul: ") + dlerror());
    return found;
  }

  std::mutex mutex_;
  void* handle_ = nullptr;
  SetStream set_stream_ = nullptr;
  GemmStridedBatched gemm_ = nullptr;
};

}  // namespace

void matmul(Element element, const MatmulShape& shape, const void* a, const void* b, void* c,
            void* stream) {
  static Cublas cublas;
  cublas.multiply(element, shape, a, b, c, stream);
}

}  // namespace rig
