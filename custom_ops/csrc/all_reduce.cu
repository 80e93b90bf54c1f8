// All-reduce of a step's rows over memory that the ranks of one machine share.
//
// A rank writes its rows straight into a slot of every other rank's memory. A slot is empty where
// its words are 0xffffffff, which no row that is sent contains, so the data are their own flags:
// each thread polls the words that it needs, sums, and empties them again. No barrier is needed: a
// rank writes to a buffer again two launches later. It is there only after the launch between, whose
// sums have a part of every rank, so that every rank had begun that launch and ended the one before.
//
// Sources: the LL protocol of NCCL (data as flags); TensorRT-LLM's Lamport all-reduce (one-shot,
// fused with the norm).
#include "all_reduce.h"
#include "ptx.cuh"

namespace fd_dsa::peers {

using Job = FdDsaAllReduce;

// bfloat16 values of a thread's vector
constexpr int kValues = 8;
constexpr int kMostThreads = 1024;
constexpr int kHeaderBytes = 256;
constexpr uint32_t kEmpty = 0xffffffffu;
constexpr uint32_t kPollsPerLook = 1024;

// At the start of a rank's memory; only this rank touches it.
struct State {
  // launches so far, and blocks of this one that have read that number
  uint32_t launches, arrived;
};

// Who works on a row: `blocks` blocks of `threads` threads, of which there are `groups`.
struct Grid {
  int groups, blocks, threads;
};

__device__ __forceinline__ bool is_empty(uint4 x) {
  return x.x == kEmpty || x.y == kEmpty || x.z == kEmpty || x.w == kEmpty;
}

// The same values in words that are not empty: two negative NaNs become positive ones.
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

// The ranks' slots in this launch.
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

  // To all other ranks.
  __device__ __forceinline__ void send(int64_t place, uint4 x) const {
#pragma unroll
    for (int i = 1; i < kSize; ++i) {
      // not all ranks to the same one at the same time
      const int rank = (job.rank + i) % kSize;
      store_shared_rank(slot(rank, job.rank) + place, x);
    }
  }

  // What the other ranks from `first` on have sent; it waits for it, and leaves their places empty.
  __device__ __forceinline__ void take(int64_t place, int first, uint4 (&found)[kAtOnce]) const {
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
      if (polls % kPollsPerLook != 0) continue;
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

  // The sum over all ranks, of which this one has `own`.
  __device__ __forceinline__ uint4 sum(int64_t place, uint4 own) const {
    Vector total(uint4{});
#pragma unroll
    for (int first = 0; first < kSize; first += kAtOnce) {
      uint4 found[kAtOnce];
      take(place, first, found);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) total.add(Vector(first + i == job.rank ? own : found[i]));
    }
    return total.rounded();
  }
};

// Sum over all threads of a row, the same on each. `parts` are 32 numbers that no thread still
// reads; every warp of the row has one of them.
template <bool kCluster>
__device__ __forceinline__ float row_sum(float value, uint32_t* parts, const Grid& grid) {
  using Blocks = Cluster<kCluster>;
  const int lane = threadIdx.x % kWarp, warps = grid.threads / kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  const int warp = static_cast<int>(Blocks::rank()) * warps + static_cast<int>(threadIdx.x) / kWarp;
  if (lane < grid.blocks) Blocks::store(parts + warp, lane, __float_as_uint(value));
  Blocks::sync();
  value = lane < grid.blocks * warps ? __uint_as_float(parts[lane]) : 0.0f;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Residual add and RMSNorm of a row whose sum the threads have.
template <bool kCluster>
__device__ __forceinline__ void add_norm(const Job& job, const Grid& grid, int row, int vector,
                                         bool active, uint4 sum, uint32_t* parts) {
  const int64_t place = static_cast<int64_t>(row) * (job.width / kValues) + vector;
  uint4 hidden = {};
  if (active) {
    Vector total(static_cast<const uint4*>(job.residual)[place]);
    total.add(Vector(sum));
    hidden = total.rounded();
    static_cast<uint4*>(job.out)[place] = hidden;
  }
  Vector x(hidden);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) squares += x.at[i] * x.at[i];
  const float mean = __fdiv_rn(row_sum<kCluster>(squares, parts, grid), job.width);
  const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + job.epsilon));
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (active) x.at[i] = x.at[i] * inverse * job.weight[vector * kValues + i];
  }
  if (active) static_cast<uint4*>(job.normed)[place] = x.rounded();
}

template <int kSize, bool kCluster>
__global__ void __launch_bounds__(kMostThreads)
    all_reduce_kernel(const __grid_constant__ Job job, Grid grid) {
  using Blocks = Cluster<kCluster>;
  auto* parts = reinterpret_cast<uint32_t*>(shared_memory());
  // no block may write to the memory of one that has not begun
  Blocks::arrive();
  const int vectors = job.width / kValues, group = static_cast<int>(blockIdx.x) / grid.blocks;
  const int vector = static_cast<int>(Blocks::rank()) * grid.threads + threadIdx.x;
  const bool active = vector < vectors;
  const auto* x = static_cast<const uint4*>(job.x);
  auto* out = static_cast<uint4*>(job.out);
  wait_for_inputs();
  auto* state = static_cast<State*>(job.ranks[job.rank]);
  const uint32_t launches = *static_cast<volatile uint32_t*>(&state->launches);
  const Slots<kSize> slots = {job, launches % 2};
  const auto place = [&](int row) { return static_cast<int64_t>(row) * vectors + vector; };
  for (int row = group; active && row < job.num_rows; row += grid.groups) {
    slots.send(place(row), sendable(x[place(row)]));
  }
  start_next();
  Blocks::wait();
  // the last block to have read the number of launches counts this one
  if (threadIdx.x == 0 &&
      atomicAdd(&state->arrived, 1u) + 1 == static_cast<uint32_t>(grid.groups * grid.blocks)) {
    state->arrived = 0;
    state->launches = launches + 1;
  }
  for (int row = group, turn = 0; row < job.num_rows; row += grid.groups, turn ^= 1) {
    uint4 sum = {};
    if (active) sum = slots.sum(place(row), sendable(x[place(row)]));
    if (job.residual != nullptr) {
      add_norm<kCluster>(job, grid, row, vector, active, sum, parts + turn * kWarp);
    } else if (active) {
      out[place(row)] = sum;
    }
  }
}

template <int kSize>
int launch_all_reduce(const Job& job, const Grid& grid, void* stream, bool can_start_early) {
  const auto blocks = static_cast<unsigned>(grid.groups * grid.blocks);
  const auto threads = static_cast<unsigned>(grid.threads);
  auto config = launch_config(blocks, threads, stream, 2 * kWarp * sizeof(uint32_t));
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (grid.blocks > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(grid.blocks), 1, 1};
  }
  if (can_start_early && job.starts_early != 0) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  return grid.blocks > 1 ? launch(config, all_reduce_kernel<kSize, true>, job, grid)
                         : launch(config, all_reduce_kernel<kSize, false>, job, grid);
}

inline int launch_all_reduce(const Job& job, void* stream) {
  if (job.num_rows <= 0) return 0;
  const int vectors = job.width / kValues;
  if (job.width % kValues != 0 || vectors < 1 || vectors > kMostThreads ||
      static_cast<int64_t>(job.num_rows) * vectors > job.slot_vectors) {
    return cudaErrorInvalidValue;
  }
  int device = 0, major = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return static_cast<int>(error);
  if (job.max_blocks > 0) most = job.max_blocks;
  // a few rows: several processors send a row
  Grid grid = {0, major >= 9 ? 8 : 1, 0};
  while (grid.blocks > 1 &&
         (2 * job.num_rows * grid.blocks > most || vectors < grid.blocks * kWarp)) {
    grid.blocks /= 2;
  }
  const int of_block = (vectors + grid.blocks - 1) / grid.blocks;
  grid.threads = (of_block + kWarp - 1) / kWarp * kWarp;
  grid.groups = job.num_rows < most / grid.blocks ? job.num_rows : most / grid.blocks;
  switch (job.size) {
    case 2: return launch_all_reduce<2>(job, grid, stream, major >= 9);
    case 4: return launch_all_reduce<4>(job, grid, stream, major >= 9);
    case 8: return launch_all_reduce<8>(job, grid, stream, major >= 9);
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
