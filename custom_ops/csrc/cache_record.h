// The records of fp8_ds_mla caches in C++.
//
// fd_dsa/cache_formats.py defines them for Python, and a test compares the two.
#pragma once

namespace fd_dsa {

// A slot of the latent cache: e4m3 codes of the latents, a float32 scale per kScaled latents and
// the bfloat16 roped values. Offsets and sizes are in bytes.
constexpr int kRank = 512, kRope = 64, kScaled = 128;
constexpr int kWidth = kRank + kRope;
constexpr int kScalesAt = kRank;
constexpr int kRopeAt = kScalesAt + 4 * (kRank / kScaled);
constexpr int kRecord = kRopeAt + 2 * kRope;
// A key of the indexer: e4m3 codes and a float32 scale, in separate parts of the block.
constexpr int kIndexWidth = 128;
constexpr int kIndexRecord = kIndexWidth + 4;

// the record sizes of existing caches, which all readers share
static_assert(kRecord == 656 && kIndexRecord == 132);
// kernels read 16 bytes at a time
static_assert(kScalesAt % 16 == 0 && kRopeAt % 16 == 0 && kRecord % 16 == 0);

}  // namespace fd_dsa
