"""The all-reduce among several ranks of one GPU, each on a stream: memory of their own, one device.

What it cannot show is the way between two GPUs. Launches of all ranks must run at once, which they
do not under compute-sanitizer.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import numpy as np
import pytest

from fd_dsa.distributed.shared_memory import PeerAllReduce
from tests.distributed.rank_checks import part
from tests.distributed.sums import sum_of

pytestmark = pytest.mark.gpu
# of 1,024 values; 180 go in two stages on four ranks
SIZES_IN_TURN = (1, 4, 1, 12, 180, 3, 30, 180, 1)


@pytest.fixture(autouse=True)
def one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that begins early may only follow another one of its own stream."""
    monkeypatch.setenv("FD_DSA_PDL", "0")


class OneGpu:
    """Ranks as streams of one GPU, whose launches share its multiprocessors."""

    def __init__(self, size: int) -> None:
        import torch

        from custom_ops.build_library import build_library
        from tests.kernel_memory import open_memory

        self.size, self.memory, self._torch = size, open_memory("torch"), torch
        kernels = ctypes.CDLL(str(build_library()))
        self._late = torch.zeros(1, dtype=torch.int32).pin_memory()
        late = self._late.numpy().view(np.uint32)
        self.ranks = [PeerAllReduce(kernels, rank, size, late, 10) for rank in range(size)]
        shape = (self.ranks[0].memory_bytes,)
        full = partial(torch.full, shape, 255, dtype=torch.uint8, device="cuda")
        self._shared = [full() for _ in range(size)]
        # half as many as have room: a thread of many rows has several vectors
        blocks = torch.cuda.get_device_properties(0).multi_processor_count // (2 * size)
        for rank, memory in zip(self.ranks, self._shared, strict=True):
            memory[:256] = 0
            rank.use([one.data_ptr() for one in self._shared], blocks)
        self._streams = [torch.cuda.Stream() for _ in range(size)]
        torch.cuda.synchronize()

    def all_reduce(self, xs: list[Any], outs: list[Any]) -> None:
        """One launch of every rank, after and before what the current stream has."""
        main = self._torch.cuda.current_stream()
        for rank, stream, x, out in zip(self.ranks, self._streams, xs, outs, strict=True):
            stream.wait_stream(main)
            with self._torch.cuda.stream(stream):
                rank(x, out)
        for stream in self._streams:
            main.wait_stream(stream)

    def put(self, rows: int, width: int) -> tuple[list[Any], list[Any]]:
        """Parts of all ranks, and poisoned memory for their sums."""
        parts = [self.memory.put(part(r, rows, width), "bfloat16") for r in range(self.size)]
        return parts, [self.memory.poisoned((rows, width), "bfloat16") for _ in parts]

    def check(self, outs: list[Any], rows: int, width: int) -> None:
        expected = sum_of([part(r, rows, width) for r in range(self.size)])
        for out in outs:
            np.testing.assert_array_equal(self.memory.get(out), expected, f"{rows} x {width}")


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_at_once_get_the_sum_in_their_order(size: int) -> None:
    gpu = OneGpu(size)
    for rows, width in [(1, 7168), (3, 64), (1, 8192), (9, 6144), (40, 7168), (128, 7168), (2, 8)]:
        xs, outs = gpu.put(rows, width)
        gpu.all_reduce(xs, outs)
        gpu.check(outs, rows, width)
        # in place, too
        gpu.all_reduce(xs, xs)
        gpu.check(xs, rows, width)


@pytest.mark.parametrize("size", [2, 4])
def test_ten_thousand_replays_give_the_same_bits(size: int) -> None:
    import torch

    gpu, width = OneGpu(size), 1024
    pairs = [gpu.put(rows, width) for rows in SIZES_IN_TURN]

    def work() -> None:
        for xs, outs in pairs:
            gpu.all_reduce(xs, outs)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    # a memory checker follows few of them
    replays = 10_000 // len(pairs) + 1 if gpu.memory.large else 20
    for number in range(replays):
        graph.replay()
        if number % 100 == 0:
            for rows, (_, outs) in zip(SIZES_IN_TURN, pairs, strict=True):
                gpu.check(outs, rows, width)
