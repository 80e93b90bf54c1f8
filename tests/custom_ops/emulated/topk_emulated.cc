// The kernels of top-k on the emulated GPU, in small blocks and with sizes of the caller's choice.
#include "ptx.cuh"
// the other comes first, so that its guard keeps the hardware's own out
#include "topk.cu"

using namespace fd_dsa::topk;

template <int kThreads, int kUnroll, int kHeld, bool kAhead, int kRegisterRowThreads>
int launch_small(const Rows& rows, const Sizes& sizes) {
  const fd_dsa::Gpu gpu = {0, 9, 132, emulated::kSharedBytes};
  if (sizes.cluster == 0) {
    return launch_register_rows<kRegisterRowThreads, 1, 2 * kUnroll>(rows, gpu, nullptr);
  }
  if (sizes.cluster == 1) {
    return launch_bound<kThreads, 1, kUnroll, kHeld, kAhead, false>(rows, sizes, gpu, nullptr);
  }
  return launch_bound<kThreads, 1, kUnroll, kHeld, kAhead, true>(rows, sizes, gpu, nullptr);
}

// `cluster` 0: rows are held in registers. Wide blocks hold rows of up to 508 scores also otherwise.
extern "C" int topk_emulated(const FdDsaTopk* rows, int wide, int cluster, int capacity,
                             int num_bits) {
  const Sizes sizes = {cluster, capacity, num_bits, rows->k <= capacity ? rows->k : 0};
  return wide ? launch_small<128, 2, 1, true, 512>(*rows, sizes)
              : launch_small<64, 1, 0, false, 64>(*rows, sizes);
}

// The kernel for rows that do not fit into registers, in blocks and with sizes as the launcher has
// them for so many rows. Leaves the bytes that were loaded of the scores.
extern "C" int topk_emulated_among(const FdDsaTopk* rows, int num_rows, uint64_t* bytes) {
  Rows all = *rows;
  all.num_rows = num_rows;
  const fd_dsa::Gpu gpu = {0, 9, 132, emulated::kSharedBytes};
  const Sizes sizes = choose_sizes(all, gpu, sizeof(Shared));
  emulated::bytes_loaded = 0;
  const int code = launch_any_length(*rows, sizes, num_rows > gpu.num_sms, gpu, nullptr);
  *bytes = emulated::bytes_loaded;
  return code;
}

// What the launcher would choose: `Sizes`, and bytes of shared memory.
extern "C" void topk_sizes(const FdDsaTopk* rows, int num_sms, int* found) {
  const fd_dsa::Gpu gpu = {0, 9, num_sms, emulated::kSharedBytes};
  const Sizes sizes = choose_sizes(*rows, gpu, sizeof(Shared));
  found[0] = sizes.cluster;
  found[1] = sizes.capacity;
  found[2] = sizes.num_bits;
  found[3] = sizes.num_chosen;
  found[4] = static_cast<int>(sizeof(Shared)) + sizes.list_bytes();
}
