// A CUDA driver whose kernels do nothing: RIG_DEVICES Hopper GPUs, whose memory is the host's.
//
// Copies between host and device are real, because the start of an engine reads what it has
// written. Streams, events and kernels have an address, and all their work is done at once.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "launches.h"

namespace {

constexpr int kPage = 4096;
constexpr size_t kDeviceBytes = size_t{140} << 30;
constexpr int kProcessors = 16, kMajor = 75, kMinor = 76, kSharedOptin = 97;

// never read; only its address matters
char object[kPage];

int give_object(void** out) { return *out = object, 0; }

int copy(void* to, const void* from, size_t bytes) { return std::memcpy(to, from, bytes), 0; }

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }
int cuGetErrorString(int, const char** text) { return *text = "null driver", 0; }

int cuDeviceGetCount(int* count) {
  const char* number = std::getenv("RIG_DEVICES");
  return *count = number ? std::atoi(number) : 1, 0;
}

int cuDeviceGet(int* device, int index) { return *device = index, 0; }

int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case kProcessors: *value = 132; break;
    case kMajor: *value = 9; break;
    case kMinor: *value = 0; break;
    case kSharedOptin: *value = 227 << 10; break;
    default: return 1;
  }
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) { return give_object(context); }
int cuCtxGetCurrent(void** context) { return give_object(context); }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }

int cuModuleLoadData(void** module, const void*) { return give_object(module); }
int cuModuleGetFunction(void** function, void*, const char*) { return give_object(function); }
int cuFuncGetAttribute(int* value, int, void*) { return *value = 0, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncLoad(void*) { return 0; }
int cuLaunchKernelEx(const void*, void*, void**, void**) { return launches++, 0; }

int cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = *total = kDeviceBytes, 0; }

int cuMemHostAlloc(void** out, size_t bytes, unsigned) {
  *out = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  return *out ? 0 : 2;
}

int cuMemFreeHost(void* memory) { return std::free(memory), 0; }

int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void*) {
  return copy(to, from, bytes);
}

int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void*) {
  return copy(to, from, bytes);
}

int cuMemcpyDtoDAsync_v2(void*, const void*, size_t, void*) { return 0; }

// the memory that ranks share, which no kernel reads
int cuMemAlloc_v2(void** out, size_t) { return give_object(out); }
int cuMemsetD8Async(void*, unsigned char, size_t, void*) { return 0; }
int cuIpcGetMemHandle(void* handle, void*) { return std::memset(handle, 1, 64), 0; }
struct Handle {
  char reserved[64];
};
int cuIpcOpenMemHandle_v2(void** out, Handle, unsigned) { return give_object(out); }
int cuIpcCloseMemHandle(void*) { return 0; }

int cuStreamCreate(void** stream, unsigned) { return give_object(stream); }
int cuStreamDestroy_v2(void*) { return 0; }
int cuStreamSynchronize(void*) { return 0; }
int cuStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cuStreamIsCapturing(void*, int* status) { return *status = 0, 0; }
int cuThreadExchangeStreamCaptureMode(int*) { return 0; }

int cuEventCreate(void** event, unsigned) { return give_object(event); }
int cuEventDestroy_v2(void*) { return 0; }
int cuEventRecord(void*, void*) { return 0; }
int cuEventSynchronize(void*) { return 0; }
int cuEventQuery(void*) { return 0; }
}
