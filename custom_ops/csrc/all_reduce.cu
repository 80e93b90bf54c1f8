// All-reduce of a step's rows over memory that the ranks of one machine share.
//
// A rank writes its rows into a slot of every other rank's memory. An empty slot holds the words
// 0xffffffff, which a sent row never contains. The data are therefore their own flags. Each thread
// polls the words that it needs, sums them and empties them again.
//
// No barrier is needed, because a rank writes to the same buffer again only two launches later. It
// reaches that launch only after the launch between, whose sums contain a part of every rank. So
// every rank has begun the launch between and has ended the one before.
//
// Many rows go in two stages. Each rank receives the parts of its own share of the vectors, sums
// them in the same way and sends the rounded sums to the others. Each of R ranks sends (R - 1) / R
// of the rows twice, instead of all rows R - 1 times. The order of a sum is the same, and so are
// the bits.
//
// The buffers are safe for any sequence of stages and sizes. In a slot the sums come after the
// parts, so a launch writes to no address twice. A launch takes all that it receives, so it leaves
// every address empty. A sum from another rank also contains a part of every rank.
//
// Sources: the LL protocol of NCCL (data as flags); TensorRT-LLM's Lamport all-reduce (one-shot).
#include "all_reduce.h"

#include <algorithm>

#include "ptx.cuh"

namespace fd_dsa::peers {

using Job = FdDsaAllReduce;

// bfloat16 values of a thread's vector
constexpr int kValues = 8;
constexpr int kMinThreads = 128, kMaxThreads = 1024;
constexpr int kHeaderBytes = 256;
constexpr uint32_t kEmpty = 0xffffffffu;
constexpr uint32_t kPollsPerClockRead = 1024;
// Two stages serve from this saving in sent bytes on. One stage needs 1.5 us for it at its 340 GB/s
// among H100s and H200s, about as long as another exchange between ranks.
constexpr int64_t kMinSavedBytes = 512 << 10;

// The start of a rank's memory, which only this rank accesses.
struct State {
  // launches so far, and blocks of this launch that have read that number
  uint32_t launches, arrived;
};

__device__ __forceinline__ bool is_empty(uint4 x) {
  return x.x == kEmpty || x.y == kEmpty || x.z == kEmpty || x.w == kEmpty;
}

// Replaces words equal to kEmpty: their two negative NaNs become positive ones.
__device__ __forceinline__ uint4 sendable(uint4 x) {
  const auto word = [](uint32_t bits) { return bits == kEmpty ? 0x7fff7fffu : bits; };
  return {word(x.x), word(x.y), word(x.z), word(x.w)};
}

struct Vector {
  float at[kValues];

  __device__ __forceinline__ explicit Vector(uint4 x) {
    const uint32_t words[] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t bits = words[i / 2];
      at[i] = __uint_as_float(i % 2 == 0 ? bits << 16 : bits & 0xffff0000u);
    }
  }
  __device__ __forceinline__ void add(const Vector& other) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) at[i] += other.at[i];
  }
  __device__ __forceinline__ uint4 rounded() const {
    return {pack_bfloat16(at[0], at[1]), pack_bfloat16(at[2], at[3]), pack_bfloat16(at[4], at[5]),
            pack_bfloat16(at[6], at[7])};
  }
};

// The slots of the ranks in this launch.
template <int kSize>
struct Slots {
  // ranks whose values a thread holds at the same time
  static constexpr int kAtOnce = kSize < 4 ? kSize : 4;

  const Job& job;
  uint32_t buffer;

  __device__ __forceinline__ uint4* slot(int rank, int source) const {
    auto* first = static_cast<unsigned char*>(job.ranks[rank]) + kHeaderBytes;
    const int64_t index = static_cast<int64_t>(buffer) * kSize + source;
    return reinterpret_cast<uint4*>(first) + index * job.slot_vectors;
  }

  // Sends `part_of(rank)` to each of the other ranks.
  template <typename PartOf>
  __device__ __forceinline__ void send(int64_t place, PartOf part_of) const {
    uint4 parts[kSize];
    // loads after a store would wait for each other
#pragma unroll
    for (int i = 1; i < kSize; ++i) parts[i] = part_of((job.rank + i) % kSize);
#pragma unroll
    for (int i = 1; i < kSize; ++i) {
      // each rank starts with another target, so that the ranks do not write to one at the same
      // time
      const int rank = (job.rank + i) % kSize;
      store_shared_rank(slot(rank, job.rank) + place, parts[i]);
    }
  }

  // Waits for the values of the other ranks from `first` on, and empties their addresses.
  __device__ __forceinline__ void receive(int64_t place, int first, uint4 (&found)[kAtOnce]) const {
    const uint32_t mask = ~(1u << job.rank >> first);
    uint4* at = slot(job.rank, first) + place;
    uint64_t begin = 0;
    for (uint32_t polls = 1;; ++polls) {
      int late = -1;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (mask >> i & 1) found[i] = load_shared_rank(at + i * int64_t{job.slot_vectors});
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if ((mask >> i & 1) && is_empty(found[i])) late = first + i;
      }
      if (late < 0) break;
      poll_again();
      if (polls % kPollsPerClockRead != 0) continue;
      const uint64_t now = nanoseconds();
      if (begin == 0) begin = now;
      if (now - begin > job.timeout_ns) fail(job.late, static_cast<uint32_t>(late) + 1);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (mask >> i & 1) {
        store_shared_rank(at + i * int64_t{job.slot_vectors}, {kEmpty, kEmpty, kEmpty, kEmpty});
      }
    }
  }

  // Calls `use` with each rank, in order, and the rank's values, which are `own` for this rank.
  template <typename Use>
  __device__ __forceinline__ void for_each_rank(int64_t place, uint4 own, Use use) const {
#pragma unroll
    for (int first = 0; first < kSize; first += kAtOnce) {
      uint4 found[kAtOnce];
      receive(place, first, found);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) use(first + i, first + i == job.rank ? own : found[i]);
    }
  }

  // Returns the sum over all ranks, of which `own` is this rank's part. Its NaNs are positive, so
  // it can be sent.
  __device__ __forceinline__ uint4 sum(int64_t place, uint4 own) const {
    Vector total(uint4{});
    for_each_rank(place, own, [&](int, uint4 x) { total.add(Vector(x)); });
    return total.rounded();
  }
};

// Returns the vectors of a share. The last shares may end after the last vector.
__host__ __device__ inline int share_of(int num_vectors, int shares) {
  return (num_vectors + shares - 1) / shares;
}

// Sums all vectors on each rank with one share, and each rank's own share in two stages with
// `kSize`.
template <int kSize, int kShares>
__global__ void __launch_bounds__(kMaxThreads) all_reduce_kernel(const __grid_constant__ Job job) {
  const auto* x = static_cast<const uint4*>(job.x);
  auto* out = static_cast<uint4*>(job.out);
  const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int step = static_cast<int>(gridDim.x * blockDim.x);
  const int share = share_of(job.num_vectors, kShares);
  // a thread reads and writes the same addresses of all shares, so `out` may be `x`
  const auto index = [&](int rank, int place) { return rank % kShares * share + place; };
  const auto part = [&](int rank, int place) {
    const int i = index(rank, place);
    return kShares == 1 || i < job.num_vectors ? sendable(x[i]) : uint4{};
  };
  wait_for_inputs();
  auto* state = static_cast<State*>(job.ranks[job.rank]);
  const uint32_t launches = *static_cast<volatile uint32_t*>(&state->launches);
  const Slots<kSize> slots = {job, launches % 2};
  for (int i = first; i < share; i += step) {
    const uint4 own = part(job.rank, i);
    slots.send(i, [&](int rank) { return kShares == 1 ? own : part(rank, i); });
  }
  start_next();
  // the last block that has read the number of launches counts this launch
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&state->arrived, 1u) + 1 == gridDim.x) {
    state->arrived = 0;
    state->launches = launches + 1;
  }
  for (int i = first; i < share; i += step) {
    const uint4 sum = slots.sum(i, part(job.rank, i));
    if constexpr (kShares == 1) {
      out[i] = sum;
    } else {
      slots.send(share + i, [&](int) { return sum; });
      slots.for_each_rank(share + i, sum, [&](int rank, uint4 theirs) {
        const int at = index(rank, i);
        if (at < job.num_vectors) out[at] = theirs;
      });
    }
  }
}

inline int launch_all_reduce(const Job& job, void* stream) {
  if (job.num_vectors <= 0) return 0;
  if (job.num_vectors > job.slot_vectors) return cudaErrorInvalidValue;
  Gpu gpu = {};
  const cudaError_t error = find_gpu(gpu);
  if (error != cudaSuccess) return static_cast<int>(error);
  const int max_blocks = job.max_blocks > 0 ? job.max_blocks : gpu.num_sms;
  // bytes that a rank sends: bytes * (size - 1), or bytes * 2 * (size - 1) / size
  const int64_t bytes = job.num_vectors * int64_t{sizeof(uint4)};
  const int64_t saved = bytes * (job.size - 1) * (job.size - 2);
  const bool split = job.size > 2 && saved >= kMinSavedBytes * job.size;
  const int share = share_of(job.num_vectors, split ? job.size : 1);
  // a thread takes one vector of a share, or more if there are more vectors than threads
  const int vectors_per_block = (share + max_blocks - 1) / max_blocks;
  const int whole_warps = (vectors_per_block + kWarp - 1) / kWarp * kWarp;
  const int threads = std::clamp(whole_warps, kMinThreads, kMaxThreads);
  const int blocks = std::min((share + threads - 1) / threads, max_blocks);
  auto config = launch_config(blocks, threads, stream);
  LaunchAttributes attributes;
  if (gpu.major >= 9 && job.starts_early != 0) start_early(config, attributes);
  switch (job.size) {
    case 2: return launch(config, all_reduce_kernel<2, 1>, job);
    case 4: return launch(config, split ? all_reduce_kernel<4, 4> : all_reduce_kernel<4, 1>, job);
    case 8: return launch(config, split ? all_reduce_kernel<8, 8> : all_reduce_kernel<8, 1>, job);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fd_dsa::peers

extern "C" int fd_dsa_all_reduce_cuda(const FdDsaAllReduce* job, void* stream) {
  return fd_dsa::peers::launch_all_reduce(*job, stream);
}

extern "C" int64_t fd_dsa_all_reduce_memory(int size, int slot_vectors) {
  return fd_dsa::peers::kHeaderBytes + int64_t{2} * size * slot_vectors * sizeof(uint4);
}

extern "C" int fd_dsa_all_reduce_bytes() { return static_cast<int>(sizeof(FdDsaAllReduce)); }
