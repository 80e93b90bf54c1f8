// The device without a GPU: memory of the host, streams and events that are done at once.
//
// With RIG_GUARD every allocation is one anonymous memory file mapped twice. Paddle gets the
// mapping without access rights, so host code that follows a device pointer faults as on a GPU;
// the copies and kernels of the plug-in go through the other mapping.
//
// With RIG_NULL an allocation is address space that takes memory only when host code writes to it,
// so that weights of any size fit. There are RIG_DEVICES devices, and copies between tensors of a
// device do nothing.

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

#include "rig.h"

namespace rig {
namespace {

// fresh memory holds no zeros, so that nothing relies on them; no type reads it as NaN
constexpr int kPoison = 0xA5;
constexpr size_t kAlignment = 256;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

#ifdef RIG_GUARD
struct Mapping {
  char* readable;
  size_t bytes;
};
std::map<uintptr_t, Mapping> mappings;  // by device address
std::mutex mappings_mutex;

C_Status allocate(const C_Device, void** pointer, size_t bytes) {
  const size_t mapped = round_up(bytes ? bytes : 1, sysconf(_SC_PAGESIZE));
  const int file = memfd_create("rig", 0);
  if (file < 0 || ftruncate(file, mapped) != 0) return C_FAILED;
  void* device = mmap(nullptr, mapped, PROT_NONE, MAP_SHARED, file, 0);
  void* host = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (device == MAP_FAILED || host == MAP_FAILED) return C_FAILED;
  std::memset(host, kPoison, mapped);
  {
    std::lock_guard<std::mutex> lock(mappings_mutex);
    mappings[reinterpret_cast<uintptr_t>(device)] = {static_cast<char*>(host), mapped};
  }
  *pointer = device;
  counters.allocations++;
  counters.allocated_bytes += bytes;
  return C_SUCCESS;
}

C_Status release(const C_Device, void* pointer, size_t) {
  std::lock_guard<std::mutex> lock(mappings_mutex);
  const auto found = mappings.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == mappings.end()) return C_FAILED;
  munmap(pointer, found->second.bytes);
  munmap(found->second.readable, found->second.bytes);
  mappings.erase(found);
  counters.frees++;
  return C_SUCCESS;
}
#elif defined(RIG_NULL)
std::map<void*, size_t> sizes;
std::mutex sizes_mutex;

C_Status allocate(const C_Device, void** pointer, size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  *pointer = mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (*pointer == MAP_FAILED) return C_FAILED;
  std::lock_guard<std::mutex> lock(sizes_mutex);
  sizes[*pointer] = bytes ? bytes : 1;
  counters.allocations++;
  counters.allocated_bytes += bytes;
  return C_SUCCESS;
}

C_Status release(const C_Device, void* pointer, size_t) {
  std::lock_guard<std::mutex> lock(sizes_mutex);
  const auto found = sizes.find(pointer);
  if (found == sizes.end()) return C_FAILED;
  munmap(pointer, found->second);
  sizes.erase(found);
  counters.frees++;
  return C_SUCCESS;
}
#else
C_Status allocate(const C_Device, void** pointer, size_t bytes) {
  const size_t rounded = round_up(bytes ? bytes : 1, kAlignment);
  *pointer = std::aligned_alloc(kAlignment, rounded);
  if (*pointer == nullptr) return C_FAILED;
  std::memset(*pointer, kPoison, rounded);
  counters.allocations++;
  counters.allocated_bytes += bytes;
  return C_SUCCESS;
}

C_Status release(const C_Device, void* pointer, size_t) {
  std::free(pointer);
  counters.frees++;
  return C_SUCCESS;
}
#endif

void fill_streams_and_events(C_DeviceInterface* interface) {
  interface->create_stream = [](const C_Device, C_Stream* stream) {
    counters.streams++;
    *stream = static_cast<C_Stream>(std::malloc(1));  // only its address matters
    return C_SUCCESS;
  };
  interface->destroy_stream = [](const C_Device, C_Stream stream) {
    std::free(stream);
    return C_SUCCESS;
  };
  interface->query_stream = [](const C_Device, C_Stream) { return C_SUCCESS; };
  interface->stream_add_callback = [](const C_Device device, C_Stream stream, C_Callback callback,
                                      void* user_data) {
    C_Status status = C_SUCCESS;
    callback(device, stream, user_data, &status);
    return status;
  };
  interface->create_event = [](const C_Device, C_Event* event) {
    counters.events++;
    *event = static_cast<C_Event>(std::malloc(1));
    return C_SUCCESS;
  };
  interface->destroy_event = [](const C_Device, C_Event event) {
    std::free(event);
    return C_SUCCESS;
  };
  interface->record_event = [](const C_Device, C_Stream, C_Event) { return C_SUCCESS; };
  interface->query_event = [](const C_Device, C_Event) { return C_SUCCESS; };
  interface->stream_wait_event = [](const C_Device, C_Stream, C_Event) { return C_SUCCESS; };
  interface->synchronize_device = [](const C_Device) {
    counters.device_syncs++;
    return C_SUCCESS;
  };
  interface->synchronize_stream = [](const C_Device, C_Stream) {
    counters.stream_syncs++;
    return C_SUCCESS;
  };
  interface->synchronize_event = [](const C_Device, C_Event) {
    counters.event_syncs++;
    return C_SUCCESS;
  };
}

size_t num_devices() {
#ifdef RIG_NULL
  if (const char* number = std::getenv("RIG_DEVICES")) return std::atoi(number);
#endif
  return 1;
}

// What one H200 answers, so that code which sizes itself by the device takes the same way.
void fill_numbers(C_DeviceInterface* interface) {
  interface->get_device_count = [](size_t* count) { return *count = num_devices(), C_SUCCESS; };
  interface->get_device_list = [](size_t* devices) {
    for (size_t i = 0; i < num_devices(); ++i) devices[i] = i;
    return C_SUCCESS;
  };
  interface->device_memory_stats = [](const C_Device, size_t* total, size_t* free) {
    *total = *free = size_t{8} << 30;
    return C_SUCCESS;
  };
  interface->get_compute_capability = [](const C_Device, size_t* v) { return *v = 90, C_SUCCESS; };
  interface->get_runtime_version = [](const C_Device, size_t* v) { return *v = 13000, C_SUCCESS; };
  interface->get_driver_version = interface->get_runtime_version;
  interface->get_multi_process = [](const C_Device, size_t* v) { return *v = 132, C_SUCCESS; };
  interface->get_max_threads_per_mp = [](const C_Device, size_t* v) {
    return *v = 2048, C_SUCCESS;
  };
  interface->get_max_threads_per_block = [](const C_Device, size_t* v) {
    return *v = 1024, C_SUCCESS;
  };
  interface->get_max_grid_dim_size = [](const C_Device, std::array<unsigned, 3>* grid) {
    *grid = {2147483647u, 65535u, 65535u};
    return C_SUCCESS;
  };
}

}  // namespace

void* readable(const void* pointer) {
#ifdef RIG_GUARD
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  std::lock_guard<std::mutex> lock(mappings_mutex);
  auto after = mappings.upper_bound(address);
  if (after != mappings.begin()) {
    const auto& [start, mapping] = *std::prev(after);
    if (address - start < mapping.bytes) return mapping.readable + (address - start);
  }
#endif
  return const_cast<void*>(pointer);
}

C_Status copy_now([[maybe_unused]] Copy kind, void* to, const void* from, size_t bytes) {
#ifdef RIG_NULL
  if (kind == Copy::d2d) return C_SUCCESS;
#endif
  std::memmove(readable(to), readable(from), bytes);
  return C_SUCCESS;
}

C_Status copy_later(Copy kind, C_Stream, void* to, const void* from, size_t bytes) {
  return copy_now(kind, to, from, bytes);
}

void fill_runtime(C_DeviceInterface* interface) {
  interface->init_device = [](const C_Device) { return C_SUCCESS; };
  interface->set_device = [](const C_Device) { return C_SUCCESS; };
  interface->get_device = [](const C_Device device) { return device->id = 0, C_SUCCESS; };
  fill_streams_and_events(interface);
  interface->device_memory_allocate = allocate;
  interface->device_memory_deallocate = release;
  interface->device_memory_set = [](const C_Device, void* to, unsigned char value, size_t bytes) {
    counters.memsets++;
    std::memset(readable(to), value, bytes);
    return C_SUCCESS;
  };
  interface->host_memory_allocate = [](const C_Device, void** pointer, size_t bytes) {
    *pointer = std::malloc(bytes);
    return *pointer ? C_SUCCESS : C_FAILED;
  };
  interface->host_memory_deallocate = [](const C_Device, void* pointer, size_t) {
    std::free(pointer);
    return C_SUCCESS;
  };
  fill_numbers(interface);
}

}  // namespace rig
