// What the files of the plug-in share: its name, its counters, and the forms' common calls.
//
// The plug-in is a Paddle CustomDevice. One set of sources builds four forms of it:
//   real   CUDA memory, streams and graphs
//   fake   host memory from malloc; no GPU needed
//   guard  host memory mapped twice, so that host code touching a device pointer faults
//   null   address space; kernels do nothing, so that a step has only the time of the host
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "paddle/phi/backends/device_ext.h"

#define RIG_EXPORT extern "C" __attribute__((visibility("default")))

namespace rig {

// the device is named as tensors print it: Place(hopper:0)
inline constexpr const char* kDeviceName = "hopper";

// X(name) for every counter; Python reads the names, so the order is free
#define RIG_COUNTERS(X)                                                        \
  X(allocations) X(allocated_bytes) X(frees)                                   \
  X(h2d) X(h2d_bytes) X(d2h) X(d2h_bytes) X(d2d) X(d2d_bytes)                  \
  X(h2d_async) X(d2h_async) X(d2d_async) X(memsets)                            \
  X(stream_syncs) X(device_syncs) X(event_syncs)                               \
  X(streams) X(events) X(op_kernels)

struct Counters {
#define RIG_MEMBER(name) std::atomic<int64_t> name{0};
  RIG_COUNTERS(RIG_MEMBER)
#undef RIG_MEMBER
};
extern Counters counters;

// Address that host code of this form may read for a device address. Only `guard` changes it.
void* readable(const void* device_pointer);

enum class Copy { h2d, d2h, d2d };

// A form's own copies, which plugin.cc counts: done on return, or queued on a stream.
C_Status copy_now(Copy kind, void* to, const void* from, size_t bytes);
C_Status copy_later(Copy kind, C_Stream stream, void* to, const void* from, size_t bytes);

// Fills in everything else of the interface that depends on the form.
void fill_runtime(C_DeviceInterface* interface);

// Registers the kernels that Paddle asks of every device, and a few that spare a fallback.
void register_view_kernels();
void register_op_kernels();

}  // namespace rig
