"""The process of one rank for `benchmarks.all_reduce`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.distributed.gpu_ranks import Rank
from tests.distributed.rank_checks import part
from tests.distributed.sums import sum_of

WIDTH, TOKENS = 7168, (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
_IN_GRAPH, _IN_A_ROW, _TIMES = 50, 10, 7


def groups_of(rank: Rank) -> dict[str, Any]:
    """Return the groups by name: our kernel, and NCCL without it."""
    from fd_dsa import custom_ops

    groups, library = {"fd_dsa": rank.group("fd_dsa")}, custom_ops.build().path
    custom_ops.use_library(None)
    groups["nccl"] = rank.group("nccl")
    custom_ops.use_library(library)
    return groups


class VllmAllReduce:
    """vLLM's custom all-reduce on torch tensors, set up as in its `CustomAllreduce`.

    Args:
        folder: as `--peers` of `benchmarks._peers`.
        rank: rank of this process.
        group: group of the same ranks, which exchanges handles.
    """

    _MOST_BYTES = 8 << 20

    def __init__(self, folder: Path, rank: Rank, group: Any) -> None:
        import torch

        from benchmarks._peers import torch_ops, vllm_ops

        self._ops: Any = torch_ops(folder, "_C_stable_libtorch.abi3.so", "_C_custom_ar")
        if self._ops is None:
            raise RuntimeError(f"no custom all-reduce of vLLM in {folder}")
        self.add_rms_norm = vllm_ops(folder).fused_add_rms_norm  # type: ignore[union-attr]
        self._rank, self._group, self._torch = rank, group, torch
        size = self._MOST_BYTES
        signals, self._buffers = (self._shared(n) for n in (self._ops.meta_size() + size, size))
        self._data = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._handle = self._ops.init_custom_ar(signals, self._data, rank.rank, True)
        self._ops.register_buffer(self._handle, self._buffers)

    def __call__(self, x: Any, out: Any) -> None:
        """Fill `out`: in a capture from `x`, else by way of a buffer that the ranks share."""
        buffer = self._buffers[self._rank.rank], self._MOST_BYTES
        captured = self._torch.cuda.is_current_stream_capturing()
        self._ops.all_reduce(self._handle, x, out, *((0, 0) if captured else buffer))

    def captured(self) -> None:
        """Register the tensors of a graph with the other ranks, before its first replay."""
        found = self._ops.get_graph_buffer_ipc_meta(self._handle)
        every = [self._of_all(values) for values in found]
        self._ops.register_graph_buffers(self._handle, *every)

    def _shared(self, num_bytes: int) -> list[int]:
        """Return addresses of memory of all ranks."""
        address, handle = self._ops.allocate_shared_buffer_and_handle(num_bytes)
        addresses = []
        for rank, values in enumerate(self._of_all(handle.tolist())):
            theirs = self._torch.tensor(values, dtype=handle.dtype)
            is_own = rank == self._rank.rank
            addresses.append(address if is_own else self._ops.open_mem_handle(theirs))
        return addresses

    def _of_all(self, values: Sequence[int]) -> list[list[int]]:
        """Return the numbers of all ranks. All have the same count."""
        own = self._rank.memory.put(np.array(values, np.int64))
        return self._rank.memory.get(self._group.all_gather(own)).tolist()


class Bench:
    """Tensors and times of a rank."""

    def __init__(self, rank: Rank) -> None:
        from fd_dsa.device.transfers import transfers_for

        self._rank, self._groups = rank, groups_of(rank)
        self._transfers = transfers_for(rank.memory.put(np.ones(1, np.float32)))
        self._vllm: VllmAllReduce | None = None
        if rank.arguments:
            self._vllm = VllmAllReduce(Path(rank.arguments[0]), rank, self._groups["nccl"])

    def time_us(
        self, call: Callable[[], Any], captured: Callable[[], None] = lambda: None
    ) -> float:
        """Return the median microseconds of a call in a graph of many calls.

        Args:
            captured: runs after the capture, before the first replay.
        """
        from benchmarks._events import device_us

        replay = self._rank.capture(lambda: [call() for _ in range(_IN_GRAPH)])
        captured()
        self._groups["nccl"].barrier()
        device, stream, times = self._transfers.device, self._transfers.stream().value or 0, []
        for _ in range(_TIMES):
            # ranks begin some microseconds apart
            one = device_us(device, lambda: [replay() for _ in range(_IN_A_ROW)], stream)
            times.append(one / (_IN_A_ROW * _IN_GRAPH))
        return median(times[1:])

    def norm(self, tokens: int, x: Any) -> Callable[[], Any]:
        """Return a call of the launch after an all-reduce, which adds a residual and norms."""
        from fd_dsa.ops.dense_kernels import rms_norm_kernel

        memory, shape = self._rank.memory, (tokens, WIDTH)
        residual = memory.put(np.zeros(shape, np.uint16), "bfloat16")
        weight = memory.put(np.ones(WIDTH, np.float32))
        total, normed = (memory.poisoned(shape, "bfloat16") for _ in range(2))
        sizes = {"WIDTH": WIDTH, "BLOCK": 8192, "ROUND_SCALES": False, "num_warps": 16}
        tensors = residual, x, weight, total, normed, None, None
        return partial(rms_norm_kernel[(tokens,)], *tensors, WIDTH, 0, 1e-6, **sizes)

    def case(self, tokens: int) -> dict[str, Any]:
        """Return the times for a number of tokens.

        Our kernel and NCCL sum zeros in place.
        """
        zeros = np.zeros((tokens, WIDTH), np.uint16)
        x = self._rank.memory.put(zeros, "bfloat16")
        norm, reduce = self.norm(tokens, x), partial(self._groups["fd_dsa"].all_reduce, x)
        found: dict[str, Any] = {"tokens": tokens, "kib": zeros.nbytes / 1024}
        for name, group in self._groups.items():
            found[f"{name}_us"] = self.time_us(partial(group.all_reduce, x))
        found["fd_dsa_norm_us"] = self.time_us(lambda: (reduce(), norm()))
        if self._vllm is not None:
            parts = [part(rank, tokens) for rank in range(self._rank.size)]
            own = self._rank.memory.put(parts[self._rank.rank], "bfloat16")
            out = self._rank.memory.poisoned(own.shape, "bfloat16")
            call = partial(self._vllm, own, out)
            found["vllm_us"] = self.time_us(call, self._vllm.captured)
            assert np.array_equal(self._rank.memory.get(out), sum_of(parts)), "vLLM's sum"
            weight = self._rank.memory.put(np.full(WIDTH, 0x3F80, np.uint16), "bfloat16")
            add = partial(self._vllm.add_rms_norm, out, x, weight, 1e-6)
            found["vllm_norm_us"] = self.time_us(lambda: (call(), add()), self._vllm.captured)
        return found


if __name__ == "__main__":
    rank = Rank(sys.argv[1:])
    bench = Bench(rank)
    rank.finish([bench.case(tokens) for tokens in TOKENS])
    # graphs that hold collectives are not put away in order
    os._exit(0)
