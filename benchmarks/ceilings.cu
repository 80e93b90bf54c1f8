// Host cost of the driver's own launches, and the time between nodes of a graph; one JSON line.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <cuda_runtime.h>

#define CHECK(call)                                                                     \
  do {                                                                                  \
    cudaError_t error = (call);                                                         \
    if (error != cudaSuccess) {                                                         \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));               \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)


__global__ void one(void *) {}
__global__ void five(void *, void *, void *, void *, int) {}
__global__ void eighteen(void *, void *, void *, void *, void *, void *, void *, void *, void *,
                         void *, void *, void *, void *, int, int, int, int, int) {}

constexpr int kBatch = 200;
constexpr int kBatches = 25;

// median microseconds that one call keeps the host; the queue is drained between batches
template <class Call>
double host_us(Call call) {
  std::vector<double> samples;
  for (int batch = 0; batch < kBatches; ++batch) {
    auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kBatch; ++i) call();
    std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - begin;
    CHECK(cudaDeviceSynchronize());
    samples.push_back(elapsed.count() / kBatch);
  }
  std::nth_element(samples.begin(), samples.begin() + kBatches / 2, samples.end());
  return samples[kBatches / 2];
}

int main() {
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  void *p = nullptr;
  CHECK(cudaMalloc(&p, 1 << 20));

  auto launch = [&](const void *kernel, void **arguments) {
    CHECK(cudaLaunchKernel(kernel, dim3(1), dim3(32), arguments, 0, stream));
  };
  int n = 1;
  void *pointers[18], *numbers[18];
  for (int i = 0; i < 18; ++i) pointers[i] = &p, numbers[i] = i < 13 ? (void *)&p : (void *)&n;
  void *of_five[5] = {&p, &p, &p, &p, &n};

  constexpr int kNodes = 1000;
  cudaGraph_t graph;
  cudaGraphExec_t runnable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kNodes; ++i) launch((const void *)one, pointers);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&runnable, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> replays;
  for (int i = 0; i < 21; ++i) {
    float milliseconds;
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(runnable, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    replays.push_back(milliseconds * 1000 / kNodes);
  }
  std::nth_element(replays.begin(), replays.begin() + 10, replays.end());

  std::printf("{\"launch_1_us\": %.3f, ", host_us([&] { launch((const void *)one, pointers); }));
  std::printf("\"launch_5_us\": %.3f, ", host_us([&] { launch((const void *)five, of_five); }));
  std::printf("\"launch_18_us\": %.3f, ",
              host_us([&] { launch((const void *)eighteen, numbers); }));
  std::printf("\"event_record_us\": %.3f, ", host_us([&] { CHECK(cudaEventRecord(end, stream)); }));
  std::printf("\"graph_node_us\": %.3f}\n", replays[10]);
  return 0;
}
