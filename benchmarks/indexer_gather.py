"""Index keys of prefill rows, gathered from their pages: one launch against vLLM's.

Bytes a key: 132 read, 132 written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import _gpu
from benchmarks._peers import vllm_cache_ops
from benchmarks._torch_device import register
from fd_dsa.ops._fp8 import INDEX_RECORD_BYTES
from fd_dsa.ops.indexer_gather import triton_kernel

# rows, keys of each
SHAPES = ((1, 8192), (1, 65536), (8, 32768), (1, 524288))
BLOCK, NUM_BLOCKS = 64, 16384


class Gather:
    """Pages of some rows in a shuffled cache, and where their keys go."""

    def __init__(self, cache: torch.Tensor, num_rows: int, num_keys: int) -> None:
        self.cache = cache
        blocks = torch.randperm(NUM_BLOCKS, device="cuda", dtype=torch.int32)
        self.tables = blocks[: num_rows * num_keys // BLOCK].view(num_rows, -1).contiguous()
        self.cu = torch.arange(num_rows + 1, device="cuda", dtype=torch.int32) * num_keys
        self.encoder = torch.full((num_rows,), num_keys, device="cuda", dtype=torch.int32)
        self.keys = torch.empty(num_rows * num_keys, 128, device="cuda", dtype=torch.uint8)
        self.scales = torch.empty(num_rows * num_keys, device="cuda")

    def ours(self, rows: int, num_warps: int) -> _gpu.Call:
        """Our launch with a configuration, arguments checked beforehand."""
        return triton_kernel.gather_kernel.bind(
            (-(-len(self.keys) // rows),),
            *(self.cache, self.tables, self.cu, self.encoder, self.keys, self.scales),
            *(len(self.keys), *self.tables.shape, NUM_BLOCKS),
            WIDTH=128,
            BLOCK_SIZE=BLOCK,
            STEPS=(len(self.tables) - 1).bit_length(),
            ROWS=rows,
            num_warps=num_warps,
        )

    def public(self) -> None:
        """Our operator, checks included."""
        triton_kernel.gather_indexer_keys(
            self.cache, self.tables, self.cu, self.encoder, self.keys, self.scales
        )

    def peer(self, ops: Any) -> _gpu.Call:
        """vLLM's gather."""
        keys = self.keys.view(torch.float8_e4m3fn)
        scales = self.scales.view(torch.uint8).view(-1, 4)
        cache, tables, cu = self.cache, self.tables, self.cu
        return lambda: ops.cp_gather_indexer_k_quant_cache(cache, keys, scales, tables, cu)

    def check(self, ops: Any) -> None:
        """Compare the first key and scale of each page with the cache; and with the peer's.

        Raises:
            AssertionError: they differ.
        """
        _gpu.poison(self.keys, self.scales)
        self.public()
        pages = self.cache.view(NUM_BLOCKS, -1)[self.tables.view(-1).long()]
        assert torch.equal(self.keys.view(len(pages), -1), pages[:, : 128 * BLOCK])
        scales = pages[:, 128 * BLOCK :].contiguous()
        assert torch.equal(self.scales.view(torch.uint8).view(len(pages), -1), scales)
        if ops is not None:
            _gpu.poison(self.keys, self.scales)
            self.peer(ops)()
            assert torch.equal(self.keys.view(len(pages), -1), pages[:, : 128 * BLOCK])


def random_cache() -> torch.Tensor:
    """uint8 [blocks, 64, 132], 138 MB: larger than the L2."""
    shape = NUM_BLOCKS, BLOCK, INDEX_RECORD_BYTES
    return torch.randint(0, 120, shape, device="cuda", dtype=torch.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    """Check and compare; returns the exit status."""
    args = _gpu.arguments(__doc__, argv)
    register()
    ops, cache = vllm_cache_ops(args.peers), random_cache()
    with _gpu.Recorder("indexer_gather", args.out) as record:
        for num_rows, num_keys in SHAPES[1:2] if args.quick else SHAPES:
            total = num_rows * num_keys
            # other sets have other pages of the cache, outputs of their own past the L2
            sets = [Gather(cache, num_rows, num_keys) for _ in range(_gpu.num_sets(264 * total))]
            sets[0].check(ops)
            sides: dict[str, list[_gpu.Call]] = {}
            if ops is not None:
                sides["vLLM's gather"] = [s.peer(ops) for s in sets]
            sides["one launch"] = [s.public for s in sets]
            times = _gpu.interleaved(sides)
            name = f"{num_rows} x {num_keys} keys"
            record.case(name, times, ours="one launch", bytes_moved=264 * total)
    return 0


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Our launch for a few rows."""
    register()
    gather = Gather(random_cache(), 8, 8192)
    return {"8 x 8192 keys": (gather.public, [gather.keys, gather.scales])}


if __name__ == "__main__":
    sys.exit(main())
