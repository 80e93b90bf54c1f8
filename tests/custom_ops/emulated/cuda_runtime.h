// A GPU for tests without one: blocks and clusters of threads as fibers of one thread.
//
// A kernel compiled as C++ against this header runs with every barrier, warp vote and atomic in
// place. Fibers change at these, in an order that differs each time, so code that leans on one
// order fails. What real hardware adds (caches, weak ordering, two threads at once) is not here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
// blocks run in turn
#define __shared__ static
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNoKernelImageForDevice };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

// What a launch keeps between two fibers; `thread_local` lets several threads launch at once.
#ifndef EMULATED_STATE
#define EMULATED_STATE
#endif

namespace emulated {

constexpr int kLanes = 32;
constexpr int kSharedBytes = 227 * 1024;
constexpr size_t kStackBytes = 32 << 10;

// Threads that wait for each other; those that have ended are not waited for.
struct Barrier {
  int members = 0, arrived = 0, turn = 0;
  void check() {
    if (members > 0 && arrived >= members) {
      arrived = 0;
      ++turn;
    }
  }
};

struct Warp {
  Barrier barrier;
  uint64_t given[kLanes] = {}, taken[kLanes] = {};
};

struct Cluster;

struct Block {
  unsigned rank = 0, index = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<int, Barrier> named_barriers;
  std::vector<unsigned char> memory;
  Cluster* cluster = nullptr;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
};

struct Fiber {
  // where it begins, and where it goes on
  ucontext_t context;
  jmp_buf place;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0;
  Block* block = nullptr;
  // the kernel has returned, and the fiber may run another thread
  bool returned = false;
  bool done = false;
  // the turn of the cluster's barrier at which this thread arrived
  int arrived_at = -1;
  // it has nothing to do while this is `held`
  const int* watched = nullptr;
  int held = 0;
  bool waits() const { return watched != nullptr && *watched == held; }
};

// bytes that all threads have loaded by instructions with a hint, which rows of scores are
inline EMULATED_STATE uint64_t bytes_loaded = 0;

inline EMULATED_STATE Fiber* current;
inline EMULATED_STATE jmp_buf scheduler;
inline EMULATED_STATE std::function<void()> body;

// What happens by itself after some rounds of the scheduler: copies that nobody waits for.
inline EMULATED_STATE uint64_t rounds_run = 0;
inline EMULATED_STATE std::map<uint64_t, std::vector<std::function<void()>>> later;

inline void let_time_pass() {
  const auto due = later.find(++rounds_run);
  if (due == later.end()) return;
  for (const auto& happen : due->second) happen();
  later.erase(due);
}

// Jumps, not swapcontext, which asks the kernel for the mask of signals each time.
inline void yield() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (std::exchange(fiber.begun, true)) _longjmp(fiber.place, 1);
  setcontext(&fiber.context);
}

inline void begin() {
  for (;;) {
    body();
    current->returned = current->done = true;
    yield();
  }
}

inline void wait_while(const int& value, int held) {
  current->watched = &value;
  current->held = held;
  while (value == held) yield();
  current->watched = nullptr;
}

inline void wait_until_zero(const int& value) {
  while (value != 0) wait_while(value, value);
}

inline void wait_at(Barrier& barrier) {
  const int turn = barrier.turn;
  ++barrier.arrived;
  barrier.check();
  wait_while(barrier.turn, turn);
}

inline unsigned lane() { return current->thread % kLanes; }

// What all lanes of the warp give, as an array.
inline const uint64_t* gather(uint64_t value) {
  Warp& warp = current->block->warps[current->thread / kLanes];
  warp.given[lane()] = value;
  const int turn = warp.barrier.turn;
  ++warp.barrier.arrived;
  if (warp.barrier.arrived == warp.barrier.members) {
    std::copy(warp.given, warp.given + kLanes, warp.taken);
  }
  warp.barrier.check();
  wait_while(warp.barrier.turn, turn);
  return warp.taken;
}

inline void end(Fiber& fiber) {
  Block& block = *fiber.block;
  Barrier& cluster = block.cluster->barrier;
  if (fiber.arrived_at == cluster.turn) --cluster.arrived;
  for (Barrier* barrier :
       {&block.barrier, &block.warps[fiber.thread / kLanes].barrier, &cluster}) {
    --barrier->members;
    barrier->check();
  }
}

// Runs all threads of a cluster to their end.
inline void run(const std::vector<Fiber*>& fibers) {
  static EMULATED_STATE uint32_t seed = 1;
  size_t left = fibers.size();
  // rounds without an end of a thread: a barrier that some never reach
  for (int idle = 0; left > 0; ++idle) {
    if (idle > 30000000) abort();
    let_time_pass();
    seed = seed * 1664525u + 1013904223u;
    const size_t first = (seed >> 8) % fibers.size();
    for (size_t i = 0; i < fibers.size(); ++i) {
      const size_t step = seed >> 31 ? fibers.size() - 1 - i : i;
      Fiber& fiber = *fibers[(first + step) % fibers.size()];
      if (fiber.done || fiber.waits()) continue;
      resume(fiber);
      if (fiber.done) {
        end(fiber);
        --left;
        idle = 0;
      }
    }
  }
  // into the memory of blocks that have ended
  if (!later.empty()) abort();
}

inline std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  // not cleared, as a GPU's is not
  fiber->stack.reset(new char[kStackBytes]);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->context, begin, 0);
  return fiber;
}

// Fibers of clusters that have ended, for the next ones. One that ended inside of the kernel is not
// run again: its frames are still on its stack.
inline EMULATED_STATE std::vector<std::unique_ptr<Fiber>> pool;

inline Fiber* take_fiber(size_t number, Block& block, unsigned thread) {
  if (number == pool.size()) pool.push_back(make_fiber());
  std::unique_ptr<Fiber>& fiber = pool[number];
  if (fiber->begun && !fiber->returned) fiber = make_fiber();
  fiber->thread = thread;
  fiber->block = &block;
  fiber->returned = fiber->done = false;
  fiber->arrived_at = -1;
  fiber->watched = nullptr;
  return fiber.get();
}

inline void run_cluster(const cudaLaunchConfig_t& config, unsigned first, unsigned size) {
  const unsigned threads = config.blockDim.x;
  Cluster cluster;
  std::vector<Fiber*> fibers;
  cluster.barrier.members = static_cast<int>(threads * size);
  for (unsigned rank = 0; rank < size; ++rank) {
    auto block = std::make_unique<Block>();
    block->rank = rank;
    block->index = first + rank;
    block->barrier.members = static_cast<int>(threads);
    block->warps.resize(threads / kLanes);
    for (Warp& warp : block->warps) warp.barrier.members = kLanes;
    block->memory.assign(config.dynamicSmemBytes + 16, 0xa5);
    block->cluster = &cluster;
    for (unsigned thread = 0; thread < threads; ++thread) {
      fibers.push_back(take_fiber(fibers.size(), *block, thread));
    }
    cluster.blocks.push_back(std::move(block));
  }
  run(fibers);
  // arrivals that no thread waited for
  for (const auto& block : cluster.blocks) {
    for (const auto& [number, barrier] : block->named_barriers) {
      if (barrier.arrived != 0) abort();
    }
  }
}

struct Index {
  unsigned x;
};

}  // namespace emulated

#define threadIdx (emulated::Index{emulated::current->thread})
#define blockIdx (emulated::Index{emulated::current->block->index})
inline EMULATED_STATE dim3 gridDim, blockDim;

inline void __syncthreads() { emulated::wait_at(emulated::current->block->barrier); }

inline void __syncwarp() { emulated::gather(0); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = emulated::kLanes) {
  const int first = static_cast<int>(emulated::lane()) / width * width;
  return static_cast<T>(emulated::gather(static_cast<uint64_t>(value))[first + lane % width]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  const unsigned lane = emulated::lane(), from = lane >= step ? lane - step : lane;
  return static_cast<T>(emulated::gather(static_cast<uint32_t>(value))[from]);
}
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int mask) {
  return static_cast<uint32_t>(emulated::gather(value)[emulated::lane() ^ mask]);
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = static_cast<uint32_t>(emulated::gather(bits)[emulated::lane() ^ mask]);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}
template <typename Step>
uint32_t reduced(uint32_t value, uint32_t start, Step step) {
  const uint64_t* all = emulated::gather(value);
  for (int i = 0; i < emulated::kLanes; ++i) start = step(start, static_cast<uint32_t>(all[i]));
  return start;
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t value) {
  return reduced(value, 0, [](uint32_t a, uint32_t b) { return a + b; });
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  return reduced(value, ~0u, [](uint32_t a, uint32_t b) { return std::min(a, b); });
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  return reduced(value, 0, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}
inline int32_t __reduce_max_sync(unsigned, int32_t value) {
  const auto larger = [](uint32_t a, uint32_t b) {
    return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? a : b;
  };
  return static_cast<int32_t>(reduced(static_cast<uint32_t>(value), 1u << 31, larger));
}
inline bool __all_sync(unsigned, bool vote) {
  return reduced(vote ? 1 : 0, 1, [](uint32_t a, uint32_t b) { return a & b; }) != 0;
}
inline bool __any_sync(unsigned, bool vote) { return !__all_sync(0, !vote); }
inline unsigned __ballot_sync(unsigned, bool vote) {
  return reduced(vote ? 1u << emulated::lane() : 0, 0,
                 [](uint32_t a, uint32_t b) { return a | b; });
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) { return std::exchange(*at, *at + value); }
inline void atomicMin(uint32_t* at, uint32_t value) { *at = std::min(*at, value); }
inline void atomicMax(uint32_t* at, uint32_t value) { *at = std::max(*at, value); }
inline void atomicOr(uint32_t* at, uint32_t value) { *at |= value; }

template <typename T>
T __ldg(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) abort();
  emulated::bytes_loaded += sizeof(T);
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return __ldg(at);
}
template <typename T>
void __stcs(T* at, T value) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) abort();
  *at = value;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  return std::max(a & 0xffff0000u, b & 0xffff0000u) | std::max(a & 0xffffu, b & 0xffffu);
}
inline uint32_t __umulhi(uint32_t x, uint32_t y) {
  return static_cast<uint32_t>(static_cast<uint64_t>(x) * y >> 32);
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= (bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return found;
}
inline uint32_t __brev(uint32_t value) {
  uint32_t found = 0;
  for (int i = 0; i < 32; ++i) found |= (value >> i & 1) << (31 - i);
  return found;
}
inline int __clz(uint32_t value) { return value == 0 ? 32 : __builtin_clz(value); }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __ffs(uint32_t value) { return __builtin_ffs(static_cast<int>(value)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float value) { return 1 / std::sqrt(value); }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline int32_t __float_as_int(float value) { return static_cast<int32_t>(__float_as_uint(value)); }
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
using std::max;
using std::min;

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A test may ask for few multiprocessors, so that a block has much of the work.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* const wanted = std::getenv("FD_DSA_EMULATED_SMS");
  const int num_sms = wanted != nullptr ? std::atoi(wanted) : 132;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : num_sms;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = emulated::kSharedBytes;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* found, Kernel, const cudaLaunchConfig_t* config) {
  *found = 128 / static_cast<int>(config->attrs->val.clusterDim.x);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no CUDA here"; }

template <typename Kernel, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel,
                               const Arguments&... arguments) {
  const unsigned size = config->numAttrs > 0 ? config->attrs->val.clusterDim.x : 1;
  if (config->dynamicSmemBytes > emulated::kSharedBytes || config->gridDim.x % size != 0) {
    return cudaErrorInvalidValue;
  }
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulated::body = [&] { kernel(arguments...); };
  for (unsigned first = 0; first < config->gridDim.x; first += size) {
    emulated::run_cluster(*config, first, size);
  }
  return cudaSuccess;
}
