"""One rank of `benchmarks.all_reduce`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from tests.distributed.gpu_ranks import Rank

WIDTH, TOKENS = 7168, (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
_IN_GRAPH, _IN_A_ROW, _TIMES = 50, 10, 7


def groups_of(rank: Rank) -> dict[str, Any]:
    """What serves -> a group: our kernel, and NCCL alone."""
    from fd_dsa import custom_ops

    groups, library = {"fd_dsa": rank.group("fd_dsa")}, custom_ops.build().path
    custom_ops.use_library(None)
    groups["nccl"] = rank.group("nccl")
    custom_ops.use_library(library)
    return groups


class Bench:
    """Tensors and times of a rank."""

    def __init__(self, rank: Rank) -> None:
        from fd_dsa.triton_runtime.transfers import transfers_for

        self._rank, self._groups = rank, groups_of(rank)
        self._stream = transfers_for(rank.memory.put(np.ones(1, np.float32))).stream

    def time_us(self, call: Callable[[], Any]) -> float:
        """Median microseconds of a call in a graph of many."""
        from benchmarks._events import device_us

        replay = self._rank.capture(lambda: [call() for _ in range(_IN_GRAPH)])
        self._groups["nccl"].barrier()
        stream, times = self._stream().value or 0, []
        for _ in range(_TIMES):
            # ranks begin some microseconds apart
            one = device_us(0, lambda: [replay() for _ in range(_IN_A_ROW)], stream)
            times.append(one / (_IN_A_ROW * _IN_GRAPH))
        return median(times[1:])

    def case(self, tokens: int) -> dict[str, Any]:
        """Both at one number of tokens; zeros, whose sums are zeros."""
        zeros = np.zeros((tokens, WIDTH), np.uint16)
        x = self._rank.memory.put(zeros, "bfloat16")
        found: dict[str, Any] = {"tokens": tokens, "kib": zeros.nbytes / 1024}
        for name, group in self._groups.items():
            found[f"{name}_us"] = self.time_us(partial(group.all_reduce, x))
        return found


if __name__ == "__main__":
    rank = Rank(sys.argv[1:])
    bench = Bench(rank)
    rank.finish([bench.case(tokens) for tokens in TOKENS])
    # graphs that hold collectives are not put away in order
    os._exit(0)
