// All-reduce of a step's rows over shared memory of one machine's ranks: the C ABI of its launcher.
#pragma once

#include <cstdint>

// Sums bfloat16 values of which every rank has a part.
//
// The sum is in float32, in the order of ranks, and is rounded once, so all ranks get the same
// bits. Layout and size are part of the ABI.
//
// A rank's memory has `fd_dsa_all_reduce_memory` bytes. The first 256 bytes are its state, which
// starts as zeros. Two buffers follow, which launches use in turn. A buffer has a slot per rank,
// and every byte of it starts as 0xff.
extern "C" struct FdDsaAllReduce {
  // the memory of each rank as this rank sees it, in the order of ranks
  void* ranks[8];
  // this rank's part: bfloat16 [8 * num_vectors], 16-byte aligned
  const void* x;
  // the sum in the same shape; may be `x`
  void* out;
  // in host memory: the late rank plus one, written before the launch fails
  uint32_t* late;
  // time that a launch waits for other ranks before it ends by a trap
  uint64_t timeout_ns;
  int32_t rank;
  // 2, 4 or 8
  int32_t size;
  // vectors of 8 values
  int32_t num_vectors;
  // capacity of a slot: at least num_vectors
  int32_t slot_vectors;
  // 0: one per multiprocessor of the device. All blocks must run at the same time.
  int32_t max_blocks;
  // 1: the launch may begin before the previous launch has ended, and waits for it in the kernel
  int32_t starts_early;
};

static_assert(sizeof(FdDsaAllReduce) == 120, "fd_dsa.distributed.shared_memory has the same");

// Sums the parts of all ranks, which call it with the same sizes in the same order.
//
// Returns a cudaError_t, 0 = success. The launcher does not allocate or wait, and CUDA graphs can
// capture it.
extern "C" int fd_dsa_all_reduce_cuda(const FdDsaAllReduce* job, void* stream);

extern "C" int64_t fd_dsa_all_reduce_memory(int size, int slot_vectors);

// Returns the size of the structure, which a caller in another language compares with its own.
extern "C" int fd_dsa_all_reduce_bytes();
