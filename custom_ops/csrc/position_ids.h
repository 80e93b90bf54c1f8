// Position ids: the C ABI of the launcher and the implementation for host memory.
#pragma once

#include "lengths.h"

// Writes position_ids[t] = seq_lens_decoder[b] + j for the j-th token of row b.
//
// t counts the tokens of all rows in order. Entries after the last token stay unchanged.
//
// seq_lens_decoder, seq_lens_this_time: int32 [num_rows]; negative lengths count as 0.
//
// position_ids: int32 [num_tokens]; tokens past its end are dropped.
//
// Returns a cudaError_t, 0 = success. The launcher does not allocate or wait.
extern "C" int fd_dsa_position_ids_cuda(const int32_t* seq_lens_decoder,
                                        const int32_t* seq_lens_this_time, int32_t* position_ids,
                                        int32_t num_rows, int32_t num_tokens, void* stream);

namespace fd_dsa {

inline void position_ids_cpu(const int32_t* seq_lens_decoder, const int32_t* seq_lens_this_time,
                             int32_t* position_ids, int32_t num_rows, int32_t num_tokens) {
  int32_t token = 0;
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t length = bounded(seq_lens_this_time[row], num_tokens);
    for (int32_t j = 0; j < length && token < num_tokens; ++j, ++token) {
      position_ids[token] = wrapping_add(seq_lens_decoder[row], j);
    }
  }
}

}  // namespace fd_dsa
