// Kernels of the plug-in as plain functions on device pointers, in all forms.
//
// No header of Paddle is included: nvcc 13 cannot read its half-precision types. Every function
// queues its work on `stream` and throws std::runtime_error when the device refuses it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rig {

void* readable(const void* device_pointer);

inline constexpr int kMaxDims = 9;

// One row-major walk over an index space, with the element strides of two arrays in it.
struct Walk {
  int num_dims = 0;
  int64_t dims[kMaxDims] = {};
  int64_t strides_a[kMaxDims] = {};
  int64_t strides_b[kMaxDims] = {};
};

enum class Element { float32, bfloat16 };
enum class BinaryOp { add, subtract, multiply, divide };

// b[walk] = a[walk] for `count` elements of 1, 2, 4, 8 or 16 bytes.
void copy_strided(const void* a, void* b, const Walk& walk, int64_t count, size_t element_bytes,
                  void* stream);

// out[i] = a[walk] op b[walk], `out` dense; computed in float32.
void binary(BinaryOp op, Element element, const void* a, const void* b, void* out,
            const Walk& walk, int64_t count, void* stream);

// out[i] = x[i] / (1 + exp(-x[i])), dense; computed in float32.
void silu(Element element, const void* x, void* out, int64_t count, void* stream);

// Every element gets the low bytes of `bits`; elements of 1, 2, 4 or 8 bytes.
void fill(void* out, uint64_t bits, int64_t count, size_t element_bytes, void* stream);

void copy_dense(const void* from, void* to, size_t bytes, void* stream);

// Row-major c[batch, m, n] = op(a) op(b), float32 accumulation, float32 inputs never as TF32.
struct MatmulShape {
  int64_t m, n, k;
  bool transpose_a, transpose_b;
  int64_t batch;
  int64_t batch_stride_a, batch_stride_b;  // elements; 0 where one matrix serves every batch
};
void matmul(Element element, const MatmulShape& shape, const void* a, const void* b, void* c,
            void* stream);

}  // namespace rig
