// An NCCL of one process that is a rank of several. The other ranks never come.
//
// A gather of a few bytes gives each rank this rank's bytes, because ranks agree by such gathers
// when they start. Larger collectives do nothing, and a broadcast never does anything: a gather of
// rows is then unavailable.

#include <cstddef>
#include <cstring>

#include "launches.h"

namespace {

constexpr size_t kFewBytes = 4096;

int num_ranks = 1;

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

int ncclAllGather(const void* from, void* to, size_t bytes, int, void*, void*) {
  for (int rank = 0; bytes <= kFewBytes && rank < num_ranks; ++rank) {
    std::memcpy(static_cast<char*>(to) + rank * bytes, from, bytes);
  }
  return launches++, 0;
}

int ncclGroupStart() { return 0; }
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void*) { return launches++, 0; }
int ncclGroupEnd() { return 0; }

int ncclCommAbort(void*) { return 0; }
int ncclCommDestroy(void*) { return 0; }
}
