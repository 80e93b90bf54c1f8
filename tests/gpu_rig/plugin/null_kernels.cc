// The kernels of the form "null", which do nothing.

#include "elementwise.h"

namespace rig {

void copy_strided(const void*, void*, const Walk&, int64_t, size_t, void*) {}

void binary(BinaryOp, Element, const void*, const void*, void*, const Walk&, int64_t, void*) {}

void silu(Element, const void*, void*, int64_t, void*) {}

void fill(void*, uint64_t, int64_t, size_t, void*) {}

void copy_dense(const void*, void*, size_t, void*) {}

void matmul(Element, const MatmulShape&, const void*, const void*, void*, void*) {}

}  // namespace rig
