// FlashInfer's exact top-k as C functions of plain arguments; see benchmarks/_peers.py.
#include <flashinfer/math.cuh>
#include <flashinfer/topk.cuh>
//
#include <flashinfer/fast_topk_clusters_exact.cuh>

namespace fi = flashinfer::sampling;

// Positions of the k best of each of `rows` rows of `len` scores; states are 1 MiB, zeroed once.
extern "C" int fi_topk(float* in, int* out, const int* offsets, int* lengths, void* states, int rows,
                       int k, int len, int deterministic, int tie, int graph_safe, void* stream) {
  return static_cast<int>(fi::TopKRaggedTransformDispatch<float, int32_t>(
      in, out, offsets, lengths, nullptr, rows, k, len, static_cast<fi::RadixRowState*>(states),
      deterministic != 0, static_cast<fi::TopKTieBreak>(tie), static_cast<cudaStream_t>(stream),
      graph_safe != 0));
}

// The same by clusters of blocks; overflow is int32 [rows, 4 * (len / clusters) * clusters].
extern "C" int fi_topk_clusters(float* in, int* out, int* offsets, int* lengths, int* overflow,
                                int rows, int k, int len, int clusters, int num_cached,
                                void* stream) {
  fi::launch_fast_topk_clusters_exact_ragged_transform<float>(
      in, out, lengths, offsets, nullptr, overflow, len / clusters, rows, len, k, num_cached,
      clusters, false, k, static_cast<cudaStream_t>(stream));
  return static_cast<int>(cudaGetLastError());
}
