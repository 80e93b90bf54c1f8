// An NCCL of one process that is a rank of several. The other ranks never come.
//
// A gather of a few bytes gives each rank this rank's bytes, because ranks agree by such gathers
// when they start. A byte from a rank is its number plus one, as in the trial of a gather of rows.
// Larger collectives do nothing.

#include <cstddef>
#include <cstring>

#include "launches.h"

namespace {

constexpr size_t kFewBytes = 4096;

int num_ranks = 1;

int arrive(void* to, size_t bytes, int rank) {
  if (bytes == 1) *static_cast<char*>(to) = static_cast<char>(rank + 1);
  return launches++, 0;
}

}  // namespace

extern "C" {

struct UniqueId {
  char internal[128];
};

const char* ncclGetErrorString(int) { return "null NCCL"; }
const char* ncclGetLastError(void*) { return ""; }
int ncclGetUniqueId(UniqueId* id) { return std::memset(id, 1, sizeof *id), 0; }

int ncclCommInitRank(void** communicator, int size, UniqueId, int) {
  *communicator = &num_ranks;
  return num_ranks = size, 0;
}

int ncclAllReduce(const void*, void*, size_t, int, int, void*, void*) { return launches++, 0; }

int ncclReduceScatter(const void*, void*, size_t, int, int, void*, void*) { return launches++, 0; }

int ncclAllGather(const void* from, void* to, size_t bytes, int, void*, void*) {
  for (int rank = 0; bytes <= kFewBytes && rank < num_ranks; ++rank) {
    std::memcpy(static_cast<char*>(to) + rank * bytes, from, bytes);
  }
  return launches++, 0;
}

int ncclGroupStart() { return 0; }
int ncclBroadcast(const void*, void* to, size_t bytes, int, int rank, void*, void*) {
  return arrive(to, bytes, rank);
}
int ncclSend(const void*, size_t, int, int, void*, void*) { return launches++, 0; }
int ncclRecv(void* to, size_t bytes, int, int rank, void*, void*) {
  return arrive(to, bytes, rank);
}
int ncclGroupEnd() { return 0; }

int ncclCommDestroy(void*) { return 0; }
}
