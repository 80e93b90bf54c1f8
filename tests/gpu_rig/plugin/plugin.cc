// Entry point that Paddle calls for every library in CUSTOM_DEVICE_ROOT, and the counters.

#include <cstdio>
#include <cstring>
#include <string>

#include "rig.h"

namespace rig {

Counters counters;

namespace {

// Start of Paddle's C++ struct of device properties; it has no header in the wheel.
struct DeviceProperties {
  std::string name;
  int major;
  int minor;
  size_t total_memory;
  int num_multi_processors;
  bool is_multi_gpu_board;
  bool is_integrated;
};

using Count = std::atomic<int64_t> Counters::*;

template <Copy kind, Count calls, Count total>
C_Status counted_now(const C_Device, void* to, const void* from, size_t bytes) {
  counters.*calls += 1;
  counters.*total += bytes;
  return copy_now(kind, to, from, bytes);
}

template <Copy kind, Count calls, Count total>
C_Status counted_later(const C_Device, C_Stream stream, void* to, const void* from, size_t bytes) {
  counters.*calls += 1;
  counters.*total += bytes;
  return copy_later(kind, stream, to, from, bytes);
}

void fill_copies(C_DeviceInterface* interface) {
  interface->memory_copy_h2d = counted_now<Copy::h2d, &Counters::h2d, &Counters::h2d_bytes>;
  interface->memory_copy_d2h = counted_now<Copy::d2h, &Counters::d2h, &Counters::d2h_bytes>;
  interface->memory_copy_d2d = counted_now<Copy::d2d, &Counters::d2d, &Counters::d2d_bytes>;
  interface->async_memory_copy_h2d =
      counted_later<Copy::h2d, &Counters::h2d_async, &Counters::h2d_bytes>;
  interface->async_memory_copy_d2h =
      counted_later<Copy::d2h, &Counters::d2h_async, &Counters::d2h_bytes>;
  interface->async_memory_copy_d2d =
      counted_later<Copy::d2d, &Counters::d2d_async, &Counters::d2d_bytes>;
}

C_Status always(bool* answer, bool value) {
  *answer = value;
  return C_SUCCESS;
}

void fill_common(C_DeviceInterface* interface) {
  interface->initialize = [] { return C_SUCCESS; };
  interface->finalize = [] { return C_SUCCESS; };
  interface->deinit_device = [](const C_Device) { return C_SUCCESS; };
  // the default of 1 byte makes the allocator hand out odd addresses
  interface->device_min_chunk_size = [](const C_Device, size_t* bytes) {
    *bytes = 256;
    return C_SUCCESS;
  };
  interface->device_extra_padding_size = [](const C_Device, size_t* bytes) {
    *bytes = 0;
    return C_SUCCESS;
  };
  interface->is_float16_supported = [](const C_Device, bool* b) { return always(b, true); };
  interface->is_bfloat16_supported = [](const C_Device, bool* b) { return always(b, true); };
  interface->is_dnn_supported = [](const C_Device, bool* b) { return always(b, false); };
  interface->get_device_properties = [](const C_Device, void* out) {
    // the device is a test rig for Hopper in all forms; nothing reads the sizes
    *static_cast<DeviceProperties*>(out) = {kDeviceName, 9, 0, size_t{1} << 37, 132, false, false};
    return C_SUCCESS;
  };
}

}  // namespace
}  // namespace rig

RIG_EXPORT void InitPlugin(CustomRuntimeParams* params) {
  C_DeviceInterface* interface = params->interface;
  // either size tells another Paddle than the headers are of; the header's own macro lets one pass
  if (params->size != sizeof(CustomRuntimeParams) ||
      interface->size != sizeof(C_DeviceInterface)) {
    std::fprintf(stderr,
                 "rig: built against another Paddle: its structs have %zu and %zu bytes, "
                 "this one's %zu and %zu; build again\n",
                 sizeof(CustomRuntimeParams), sizeof(C_DeviceInterface), params->size,
                 interface->size);
    return;
  }
  params->version.major = PADDLE_CUSTOM_RUNTIME_MAJOR_VERSION;
  params->version.minor = PADDLE_CUSTOM_RUNTIME_MINOR_VERSION;
  params->version.patch = PADDLE_CUSTOM_RUNTIME_PATCH_VERSION;
  params->device_type = const_cast<char*>(rig::kDeviceName);
  params->sub_device_type = const_cast<char*>("test");
  std::memset(reinterpret_cast<char*>(interface) + sizeof(interface->size), 0,
              sizeof(*interface) - sizeof(interface->size));
  rig::fill_common(interface);
  rig::fill_copies(interface);
  rig::fill_runtime(interface);
  rig::register_view_kernels();
  rig::register_op_kernels();
}

// Comma-separated names, in the order of rig_read_counters.
RIG_EXPORT const char* rig_counter_names() {
#define RIG_NAME(name) #name ","
  return RIG_COUNTERS(RIG_NAME);
#undef RIG_NAME
}

RIG_EXPORT void rig_read_counters(int64_t* out) {
#define RIG_READ(name) *out++ = rig::counters.name;
  RIG_COUNTERS(RIG_READ)
#undef RIG_READ
}

RIG_EXPORT void* rig_readable(const void* device_pointer) {
  return rig::readable(device_pointer);
}
