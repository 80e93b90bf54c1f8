// The device on a GPU: Paddle's callbacks as calls of the CUDA runtime.

#include <array>
#include <cstdio>

#include "cuda_forms.h"

namespace rig {

C_Status check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return C_SUCCESS;
  std::fprintf(stderr, "rig: %s: %s\n", call, cudaGetErrorString(error));
  // a later launch must not report this error as its own
  cudaGetLastError();
  return C_ERROR;
}

namespace {

#define RIG_CALL(call) check(call, #call)

// At exit Paddle frees memory after the CUDA runtime has gone; the driver frees it anyway.
C_Status check_free(cudaError_t error, const char* call) {
  return error == cudaErrorCudartUnloading ? C_SUCCESS : check(error, call);
}

C_Status allocate(const C_Device device, void** pointer, size_t bytes) {
  cudaSetDevice(device->id);
  // in any other mode an allocation breaks a capture that runs in this thread
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t error = cudaMalloc(pointer, bytes);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) {
    // Paddle turns this into its own out-of-memory error and goes on
    cudaGetLastError();
    *pointer = nullptr;
    return C_FAILED;
  }
  counters.allocations++;
  counters.allocated_bytes += bytes;
  return C_SUCCESS;
}

// Paddle's streams do not wait for the legacy stream, and neither memset nor a copy inside the
// device blocks the host: without this wait a kernel could run before them.
C_Status finish_legacy(C_Status status) {
  return status == C_SUCCESS ? RIG_CALL(cudaStreamSynchronize(cudaStreamLegacy)) : status;
}

struct HostCall {
  C_Device_st device;
  C_Stream stream;
  C_Callback callback;
  void* user_data;
};

C_Status add_callback(const C_Device device, C_Stream stream, C_Callback callback, void* data) {
  auto* call = new HostCall{*device, stream, callback, data};
  const auto run = [](void* raw) {
    auto* call = static_cast<HostCall*>(raw);
    C_Status status = C_SUCCESS;
    call->callback(&call->device, call->stream, call->user_data, &status);
    delete call;
  };
  return RIG_CALL(cudaLaunchHostFunc(cuda(stream), run, call));
}

void fill_streams(C_DeviceInterface* interface) {
  interface->create_stream = [](const C_Device device, C_Stream* stream) {
    counters.streams++;
    cudaSetDevice(device->id);
    // non-blocking: work on the legacy stream does not disturb a capture
    return RIG_CALL(cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream),
                                              cudaStreamNonBlocking));
  };
  interface->destroy_stream = [](const C_Device, C_Stream stream) {
    return check_free(cudaStreamDestroy(cuda(stream)), "cudaStreamDestroy");
  };
  interface->query_stream = [](const C_Device, C_Stream stream) {
    return cudaStreamQuery(cuda(stream)) == cudaSuccess ? C_SUCCESS : C_FAILED;
  };
  interface->stream_add_callback = add_callback;
  interface->synchronize_device = [](const C_Device device) {
    counters.device_syncs++;
    cudaSetDevice(device->id);
    return RIG_CALL(cudaDeviceSynchronize());
  };
  interface->synchronize_stream = [](const C_Device, C_Stream stream) {
    counters.stream_syncs++;
    return RIG_CALL(cudaStreamSynchronize(cuda(stream)));
  };
}

void fill_events(C_DeviceInterface* interface) {
  interface->create_event = [](const C_Device, C_Event* event) {
    counters.events++;
    return RIG_CALL(cudaEventCreate(reinterpret_cast<cudaEvent_t*>(event)));
  };
  interface->destroy_event = [](const C_Device, C_Event event) {
    return check_free(cudaEventDestroy(cuda(event)), "cudaEventDestroy");
  };
  interface->record_event = [](const C_Device, C_Stream stream, C_Event event) {
    return RIG_CALL(cudaEventRecord(cuda(event), cuda(stream)));
  };
  interface->query_event = [](const C_Device, C_Event event) {
    return cudaEventQuery(cuda(event)) == cudaSuccess ? C_SUCCESS : C_FAILED;
  };
  interface->synchronize_event = [](const C_Device, C_Event event) {
    counters.event_syncs++;
    return RIG_CALL(cudaEventSynchronize(cuda(event)));
  };
  interface->stream_wait_event = [](const C_Device, C_Stream stream, C_Event event) {
    return RIG_CALL(cudaStreamWaitEvent(cuda(stream), cuda(event), 0));
  };
}

void fill_memory(C_DeviceInterface* interface) {
  interface->device_memory_allocate = allocate;
  interface->device_memory_deallocate = [](const C_Device, void* pointer, size_t) {
    counters.frees++;
    return check_free(cudaFree(pointer), "cudaFree");
  };
  interface->device_memory_set = [](const C_Device, void* to, unsigned char value, size_t bytes) {
    counters.memsets++;
    return finish_legacy(RIG_CALL(cudaMemset(to, value, bytes)));
  };
  interface->host_memory_allocate = [](const C_Device, void** pointer, size_t bytes) {
    return RIG_CALL(cudaMallocHost(pointer, bytes));
  };
  interface->host_memory_deallocate = [](const C_Device, void* pointer, size_t) {
    return check_free(cudaFreeHost(pointer), "cudaFreeHost");
  };
}

size_t attribute(const C_Device device, cudaDeviceAttr name) {
  int value = 0;
  cudaDeviceGetAttribute(&value, name, device->id);
  return value;
}

void fill_numbers(C_DeviceInterface* interface) {
  interface->get_device_count = [](size_t* count) {
    int found = 0;
    // no driver or no device: the rig is then absent, and Paddle says so
    *count = cudaGetDeviceCount(&found) == cudaSuccess ? found : 0;
    return C_SUCCESS;
  };
  interface->get_device_list = [](size_t* devices) {
    int found = 0;
    cudaGetDeviceCount(&found);
    for (int id = 0; id < found; ++id) devices[id] = id;
    return C_SUCCESS;
  };
  interface->device_memory_stats = [](const C_Device device, size_t* total, size_t* free) {
    cudaSetDevice(device->id);
    return RIG_CALL(cudaMemGetInfo(free, total));
  };
  interface->get_compute_capability = [](const C_Device device, size_t* v) {
    *v = 10 * attribute(device, cudaDevAttrComputeCapabilityMajor) +
         attribute(device, cudaDevAttrComputeCapabilityMinor);
    return C_SUCCESS;
  };
  interface->get_runtime_version = [](const C_Device, size_t* v) {
    return *v = CUDART_VERSION, C_SUCCESS;
  };
  interface->get_driver_version = interface->get_runtime_version;
  interface->get_multi_process = [](const C_Device device, size_t* v) {
    return *v = attribute(device, cudaDevAttrMultiProcessorCount), C_SUCCESS;
  };
  interface->get_max_threads_per_mp = [](const C_Device device, size_t* v) {
    return *v = attribute(device, cudaDevAttrMaxThreadsPerMultiProcessor), C_SUCCESS;
  };
  interface->get_max_threads_per_block = [](const C_Device device, size_t* v) {
    return *v = attribute(device, cudaDevAttrMaxThreadsPerBlock), C_SUCCESS;
  };
  interface->get_max_grid_dim_size = [](const C_Device device, std::array<unsigned, 3>* grid) {
    *grid = {static_cast<unsigned>(attribute(device, cudaDevAttrMaxGridDimX)),
             static_cast<unsigned>(attribute(device, cudaDevAttrMaxGridDimY)),
             static_cast<unsigned>(attribute(device, cudaDevAttrMaxGridDimZ))};
    return C_SUCCESS;
  };
}

}  // namespace

void* readable(const void* pointer) { return const_cast<void*>(pointer); }

constexpr cudaMemcpyKind kKinds[] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                                     cudaMemcpyDeviceToDevice};

C_Status copy_now(Copy kind, void* to, const void* from, size_t bytes) {
  const C_Status status = RIG_CALL(cudaMemcpy(to, from, bytes, kKinds[static_cast<int>(kind)]));
  // the host has waited for a copy to it
  return kind == Copy::d2h ? status : finish_legacy(status);
}

C_Status copy_later(Copy kind, C_Stream stream, void* to, const void* from, size_t bytes) {
  return RIG_CALL(
      cudaMemcpyAsync(to, from, bytes, kKinds[static_cast<int>(kind)], cuda(stream)));
}

void fill_runtime(C_DeviceInterface* interface) {
  interface->init_device = [](const C_Device device) {
    return RIG_CALL(cudaSetDevice(device->id));
  };
  interface->set_device = interface->init_device;
  interface->get_device = [](const C_Device device) { return RIG_CALL(cudaGetDevice(&device->id)); };
  fill_streams(interface);
  fill_events(interface);
  fill_memory(interface);
  fill_numbers(interface);
  fill_graphs(interface);
}

}  // namespace rig
