// Integer arithmetic for host and device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FD_DSA_BOTH __host__ __device__ __forceinline__
#else
#define FD_DSA_BOTH inline
#endif

namespace fd_dsa {

// Clamps the token count of a row, for which the tensor may hold any value.
FD_DSA_BOTH int32_t bounded(int32_t length, int32_t limit) {
  return length < 0 ? 0 : (length > limit ? limit : length);
}

// Adds with wrap-around, because overflow of invalid lengths must not be undefined behaviour.
FD_DSA_BOTH int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

FD_DSA_BOTH int32_t wrapping_sub(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
}

}  // namespace fd_dsa
