// CUDA graphs: the hooks of Paddle's CUDAGraph, and the helpers that Python calls by ctypes.

#include <cstdlib>

#include "cuda_forms.h"

namespace rig {
namespace {

#define RIG_CALL(call) check(call, #call)

cudaStreamCaptureMode cuda(C_StreamCaptureMode mode) {
  switch (mode) {
    case C_StreamCaptureModeGlobal:
      return cudaStreamCaptureModeGlobal;
    case C_StreamCaptureModeThreadLocal:
      return cudaStreamCaptureModeThreadLocal;
    default:
      return cudaStreamCaptureModeRelaxed;
  }
}

C_StreamCaptureMode paddle(cudaStreamCaptureMode mode) {
  switch (mode) {
    case cudaStreamCaptureModeGlobal:
      return C_StreamCaptureModeGlobal;
    case cudaStreamCaptureModeThreadLocal:
      return C_StreamCaptureModeThreadLocal;
    default:
      return C_StreamCaptureModeRelaxed;
  }
}

C_StreamCaptureStatus paddle(cudaStreamCaptureStatus status) {
  switch (status) {
    case cudaStreamCaptureStatusActive:
      return C_StreamCaptureStatusActive;
    case cudaStreamCaptureStatusInvalidated:
      return C_StreamCaptureStatusInvalidated;
    default:
      return C_StreamCaptureStatusNone;
  }
}

C_Status capture_info(const C_Device, C_Stream stream, C_StreamCaptureStatus* status_out,
                      unsigned long long* id_out, C_CudaGraph* graph_out,
                      C_CudaGraphNode* dependencies_out, void**, size_t* num_dependencies_out) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* dependencies = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t num_dependencies = 0;
  const C_Status result =
      RIG_CALL(cudaStreamGetCaptureInfo(rig::cuda(stream), &status, &id, &graph, &dependencies,
                                        &edges, &num_dependencies));
  if (status_out) *status_out = paddle(status);
  if (id_out) *id_out = id;
  if (graph_out) *graph_out = reinterpret_cast<C_CudaGraph>(graph);
  if (dependencies_out && num_dependencies) {
    *dependencies_out = reinterpret_cast<C_CudaGraphNode>(dependencies[0]);
  }
  if (num_dependencies_out) *num_dependencies_out = num_dependencies;
  return result;
}

C_Status exchange_mode(C_StreamCaptureMode* mode) {
  cudaStreamCaptureMode exchanged = cuda(*mode);
  const C_Status status = RIG_CALL(cudaThreadExchangeStreamCaptureMode(&exchanged));
  *mode = paddle(exchanged);
  return status;
}

// Paddle's capture only asks that these handles are not null; our matmul keeps its own.
void fill_blas_handles(C_DeviceInterface* interface) {
  interface->init_blas_handle = [](const C_Device, C_BLASHandle* handle, C_Stream) {
    *handle = static_cast<C_BLASHandle>(std::malloc(1));
    return C_SUCCESS;
  };
  interface->destroy_blas_handle = [](const C_Device, C_BLASHandle handle) {
    std::free(handle);
    return C_SUCCESS;
  };
  interface->init_blaslt_handle = [](const C_Device, C_BLASLtHandle* handle) {
    *handle = static_cast<C_BLASLtHandle>(std::malloc(1));
    return C_SUCCESS;
  };
  interface->destroy_blaslt_handle = [](const C_Device, C_BLASLtHandle handle) {
    std::free(handle);
    return C_SUCCESS;
  };
  interface->blas_set_math_mode = [](const C_Device, C_BLASHandle, int) { return C_SUCCESS; };
}

}  // namespace

// The names of some hooks are misspelt in Paddle's header.
void fill_graphs(C_DeviceInterface* interface) {
  fill_blas_handles(interface);
  interface->cuda_stream_begin_capture = [](const C_Device, C_Stream stream,
                                            C_StreamCaptureMode mode) {
    return RIG_CALL(cudaStreamBeginCapture(rig::cuda(stream), cuda(mode)));
  };
  interface->cuda_stream_end_captrue = [](const C_Device, C_Stream stream, C_CudaGraph* graph) {
    return RIG_CALL(cudaStreamEndCapture(rig::cuda(stream), reinterpret_cast<cudaGraph_t*>(graph)));
  };
  interface->cuda_stream_capture_info = capture_info;
  interface->cuda_thread_exchange_stream_capthure_mode = exchange_mode;
  interface->cuda_graph_instantiate = [](C_GraphExec* exec, C_CudaGraph* graph, void**, char*,
                                         size_t) {
    return RIG_CALL(cudaGraphInstantiate(reinterpret_cast<cudaGraphExec_t*>(exec),
                                         *reinterpret_cast<cudaGraph_t*>(graph), 0));
  };
  interface->cuda_graph_launch = [](const C_Device, C_GraphExec exec, C_Stream stream) {
    return RIG_CALL(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(exec), rig::cuda(stream)));
  };
  interface->cuda_graph_destroy = [](C_CudaGraph graph) {
    return RIG_CALL(cudaGraphDestroy(reinterpret_cast<cudaGraph_t>(graph)));
  };
  interface->cuda_graph_exec_destroy = [](C_GraphExec exec) {
    return RIG_CALL(cudaGraphExecDestroy(reinterpret_cast<cudaGraphExec_t>(exec)));
  };
  interface->cuda_graph_get_nodes = [](C_CudaGraph graph, C_CudaGraphNode* nodes, size_t* count) {
    return RIG_CALL(cudaGraphGetNodes(reinterpret_cast<cudaGraph_t>(graph),
                                      reinterpret_cast<cudaGraphNode_t*>(nodes), count));
  };
  interface->cuda_graph_debug_dot_print = [](C_CudaGraph graph, const char* path, unsigned flags) {
    return RIG_CALL(cudaGraphDebugDotPrint(reinterpret_cast<cudaGraph_t>(graph), path, flags));
  };
  interface->get_parameter_setter_for_exec_graph = [](C_CudaGraph, C_GraphHookManager* hooks) {
    if (hooks) hooks->size = 0;
    return C_SUCCESS;
  };
}

}  // namespace rig

// Helpers for Python. Those that return int give a cudaError_t, 0 for success.

// Captures in relaxed mode: a failed capture ends with an error, and the process goes on.
RIG_EXPORT int rig_capture_begin(void* stream) {
  return cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeRelaxed);
}

// Ends the capture and makes it executable.
RIG_EXPORT int rig_capture_end(void* stream, void** exec, size_t* num_nodes) {
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph);
  if (error == cudaSuccess) error = cudaGraphGetNodes(graph, nullptr, num_nodes);
  if (error == cudaSuccess) {
    error = cudaGraphInstantiate(reinterpret_cast<cudaGraphExec_t*>(exec), graph, 0);
  }
  if (graph) cudaGraphDestroy(graph);
  // the next launch must not report what went wrong here
  cudaGetLastError();
  return error;
}

RIG_EXPORT int rig_graph_launch(void* exec, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec), static_cast<cudaStream_t>(stream));
}

RIG_EXPORT const char* rig_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
