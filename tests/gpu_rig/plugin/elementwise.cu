// One source for both worlds: nvcc makes kernels of the loop bodies below, g++ makes loops.

#include "elementwise.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define RIG_BOTH __host__ __device__
#else
#define RIG_BOTH
#endif

namespace rig {
namespace {

#ifdef __CUDACC__
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  // a later launch must not report this error as its own
  cudaGetLastError();
  throw std::runtime_error(std::string("rig kernel: ") + cudaGetErrorString(error));
}

template <class Body>
__global__ void run(Body body, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) body(i);
}

template <class Body>
void for_each(int64_t count, void* stream, const Body& body) {
  if (count == 0) return;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  run<<<blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, 0,
        static_cast<cudaStream_t>(stream)>>>(body, count);
  require(cudaGetLastError());
}
#else
template <class Body>
void for_each(int64_t count, void*, const Body& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}
#endif

struct Offsets {
  int64_t a, b;
};

RIG_BOTH Offsets offsets_of(const Walk& walk, int64_t i) {
  Offsets found{0, 0};
  for (int d = walk.num_dims - 1; d >= 0; --d) {
    const int64_t rest = i / walk.dims[d];
    const int64_t coordinate = i - rest * walk.dims[d];
    found.a += coordinate * walk.strides_a[d];
    found.b += coordinate * walk.strides_b[d];
    i = rest;
  }
  return found;
}

struct BFloat16 {
  uint16_t bits;

  RIG_BOTH float widen() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
  }

  // to nearest even; a NaN stays one
  static RIG_BOTH BFloat16 round(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if (value != value) return {static_cast<uint16_t>((wide >> 16) | 0x40)};
    return {static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16)};
  }
};

RIG_BOTH float widen(float value) { return value; }
RIG_BOTH float widen(BFloat16 value) { return value.widen(); }
RIG_BOTH void store(float* out, float value) { *out = value; }
RIG_BOTH void store(BFloat16* out, float value) { *out = BFloat16::round(value); }

struct Bytes16 {
  uint64_t low, high;
};

template <class T>
struct CopyStrided {
  const T* a;
  T* b;
  Walk walk;

  RIG_BOTH void operator()(int64_t i) const {
    const Offsets at = offsets_of(walk, i);
    b[at.b] = a[at.a];
  }
};

template <class T>
struct Binary {
  BinaryOp op;
  const T* a;
  const T* b;
  T* out;
  Walk walk;

  RIG_BOTH void operator()(int64_t i) const {
    const Offsets at = offsets_of(walk, i);
    const float x = widen(a[at.a]), y = widen(b[at.b]);
    float value = 0;
    switch (op) {
      case BinaryOp::add: value = x + y; break;
      case BinaryOp::subtract: value = x - y; break;
      case BinaryOp::multiply: value = x * y; break;
      case BinaryOp::divide: value = x / y; break;
    }
    store(out + i, value);
  }
};

template <class T>
struct Silu {
  const T* x;
  T* out;

  RIG_BOTH void operator()(int64_t i) const {
    const float value = widen(x[i]);
    store(out + i, value / (1.0f + expf(-value)));
  }
};

template <class T>
struct Fill {
  T* out;
  T value;

  RIG_BOTH void operator()(int64_t i) const { out[i] = value; }
};

template <class T>
const T* in(const void* pointer) { return static_cast<const T*>(readable(pointer)); }

template <class T>
T* to(void* pointer) { return static_cast<T*>(readable(pointer)); }

template <class T>
void copy_strided_as(const void* a, void* b, const Walk& walk, int64_t count, void* stream) {
  for_each(count, stream, CopyStrided<T>{in<T>(a), to<T>(b), walk});
}

template <class T>
void fill_as(void* out, uint64_t bits, int64_t count, void* stream) {
  for_each(count, stream, Fill<T>{to<T>(out), static_cast<T>(bits)});
}

[[noreturn]] void refuse(const char* what, size_t element_bytes) {
  throw std::runtime_error(std::string("rig ") + what + ": no elements of " +
                           std::to_string(element_bytes) + " bytes");
}

}  // namespace

void copy_strided(const void* a, void* b, const Walk& walk, int64_t count, size_t element_bytes,
                  void* stream) {
  switch (element_bytes) {
    case 1: return copy_strided_as<uint8_t>(a, b, walk, count, stream);
    case 2: return copy_strided_as<uint16_t>(a, b, walk, count, stream);
    case 4: return copy_strided_as<uint32_t>(a, b, walk, count, stream);
    case 8: return copy_strided_as<uint64_t>(a, b, walk, count, stream);
    case 16: return copy_strided_as<Bytes16>(a, b, walk, count, stream);
    default: refuse("strided copy", element_bytes);
  }
}

void binary(BinaryOp op, Element element, const void* a, const void* b, void* out,
            const Walk& walk, int64_t count, void* stream) {
  if (element == Element::float32) {
    for_each(count, stream, Binary<float>{op, in<float>(a), in<float>(b), to<float>(out), walk});
  } else {
    for_each(count, stream, Binary<BFloat16>{op, in<BFloat16>(a), in<BFloat16>(b),
                                             to<BFloat16>(out), walk});
  }
}

void silu(Element element, const void* x, void* out, int64_t count, void* stream) {
  if (element == Element::float32) {
    for_each(count, stream, Silu<float>{in<float>(x), to<float>(out)});
  } else {
    for_each(count, stream, Silu<BFloat16>{in<BFloat16>(x), to<BFloat16>(out)});
  }
}

void fill(void* out, uint64_t bits, int64_t count, size_t element_bytes, void* stream) {
  switch (element_bytes) {
    case 1: return fill_as<uint8_t>(out, bits, count, stream);
    case 2: return fill_as<uint16_t>(out, bits, count, stream);
    case 4: return fill_as<uint32_t>(out, bits, count, stream);
    case 8: return fill_as<uint64_t>(out, bits, count, stream);
    default: refuse("fill", element_bytes);
  }
}

void copy_dense(const void* from, void* to, size_t bytes, void* stream) {
  if (bytes == 0) return;
#ifdef __CUDACC__
  require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(stream)));
#else
  (void)stream;
  std::memmove(readable(to), readable(from), bytes);
#endif
}

#ifndef __CUDACC__
namespace {

template <class T>
void matmul_as(const MatmulShape& s, const T* a, const T* b, T* c) {
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    const T* x = a + batch * s.batch_stride_a;
    const T* y = b + batch * s.batch_stride_b;
    for (int64_t row = 0; row < s.m; ++row) {
      for (int64_t column = 0; column < s.n; ++column) {
        float sum = 0;
        for (int64_t i = 0; i < s.k; ++i) {
          sum += widen(x[s.transpose_a ? i * s.m + row : row * s.k + i]) *
                 widen(y[s.transpose_b ? column * s.k + i : i * s.n + column]);
        }
        store(c + (batch * s.m + row) * s.n + column, sum);
      }
    }
  }
}

}  // namespace

void matmul(Element element, const MatmulShape& shape, const void* a, const void* b, void* c,
            void*) {
  if (element == Element::float32) {
    matmul_as(shape, in<float>(a), in<float>(b), to<float>(c));
  } else {
    matmul_as(shape, in<BFloat16>(a), in<BFloat16>(b), to<BFloat16>(c));
  }
}
#endif

}  // namespace rig
