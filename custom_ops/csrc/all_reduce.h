// All-reduce of a step's rows over memory that the ranks of one machine share: the C ABI of its
// launcher.
#pragma once

#include <cstdint>

// Values in bfloat16 that every rank has a part of. The sum is in float32, in the order of ranks, and
// rounded once, so all ranks get the same bits. Layout and size are part of the ABI.
//
// A rank's memory has `fd_dsa_all_reduce_memory` bytes: 256 for its state, zero at first, then two
// buffers, which launches use in turn, of a slot for each rank, with every byte 0xff at first.
extern "C" struct FdDsaAllReduce {
  // the memory of each rank as this rank sees it, in the order of ranks
  void* ranks[8];
  // this rank's part: bfloat16 [8 * num_vectors], 16-byte aligned
  const void* x;
  // of the same shape, may be `x`: the sum
  void* out;
  // in host memory: one more than the rank that did not come, before the launch fails
  uint32_t* late;
  // how long a launch waits for other ranks; then it ends by a trap
  uint64_t timeout_ns;
  int32_t rank;
  // 2, 4 or 8
  int32_t size;
  // of 8 values each
  int32_t num_vectors;
  // of a slot: at least num_vectors
  int32_t slot_vectors;
  // 0: as many as the device has multiprocessors; all of them must run at once
  int32_t max_blocks;
  // 1: the launch may begin before the one before it has ended, for which it waits itself
  int32_t starts_early;
};

static_assert(sizeof(FdDsaAllReduce) == 120, "fd_dsa.distributed.shared_memory has the same");

// Every rank calls it with the same sizes, in the same order. Returns a cudaError_t, 0 = success.
// Allocates nothing, waits for nothing, can be captured.
extern "C" int fd_dsa_all_reduce_cuda(const FdDsaAllReduce* job, void* stream);

extern "C" int64_t fd_dsa_all_reduce_memory(int size, int slot_vectors);

// Size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_all_reduce_bytes();
