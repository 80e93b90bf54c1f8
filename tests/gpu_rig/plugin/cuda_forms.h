// What the CUDA files of the plug-in share.
#pragma once

#include <cuda_runtime.h>

#include "rig.h"

namespace rig {

inline cudaStream_t cuda(C_Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }
inline cudaEvent_t cuda(C_Event event) { return reinterpret_cast<cudaEvent_t>(event); }

// Status for Paddle; a failure is printed with the name of the call.
C_Status check(cudaError_t error, const char* call);

void fill_graphs(C_DeviceInterface* interface);

}  // namespace rig
