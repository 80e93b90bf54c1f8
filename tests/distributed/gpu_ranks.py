"""Processes with a GPU each, on torch tensors or on Paddle's by the rig; for tests and benchmarks.

torch ranks see all GPUs and take the one of their number; ranks of the rig see one GPU each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def num_gpus() -> int:
    """GPUs that the processes may have."""
    named = os.environ.get(_VISIBLE)
    return len(list(Path("/dev").glob("nvidia[0-9]*")) if named is None else named.split(","))


def run_ranks(module: str, size: int, memory: str, *arguments: str, timeout_s: float) -> list[Any]:
    """Return what `module` leaves on each of `size` ranks by `Rank.finish`. The ranks end together.

    Raises:
        RuntimeError: a rank failed or took too long; the others are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, folder, str(size), memory]
        processes = [
            subprocess.Popen(
                [*command, str(rank), *arguments], cwd=ROOT, env=_environment(rank, memory)
            )
            for rank in range(size)
        ]
        try:
            _wait(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def _environment(rank: int, memory: str) -> dict[str, str]:
    """Of a rank."""
    if memory == "torch":
        return dict(os.environ)
    numbers = os.environ.get(_VISIBLE, ",".join(map(str, range(num_gpus())))).split(",")
    return os.environ | {_VISIBLE: numbers[rank]}


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Wait until all have ended well."""
    while any(status := [process.poll() for process in processes]) or None in status:
        if any(status):
            raise RuntimeError(f"ranks ended with {status}; their words are above")
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks still run: {status}")
        time.sleep(0.05)


class Rank:
    """This process as one of the ranks that `run_ranks` starts with the arguments of `argv`.

    Attributes:
        memory: where its tensors are.
        allocate: makes tensors there.
        arguments: the others of `run_ranks`.
    """

    def __init__(self, argv: list[str]) -> None:
        folder, size, memory, rank, *self.arguments = argv
        self._folder, self.size, self.rank = Path(folder), int(size), int(rank)
        from custom_ops.build_library import build_library
        from fd_dsa import custom_ops
        from tests.kernel_memory import open_memory

        if memory == "torch":
            self._open_torch()
        else:
            self._open_rig()
        custom_ops.use_library(build_library())
        self.memory = open_memory(memory)
        # what the first allocations get is poison
        self.memory.poisoned((256 << 20,), "uint8")

    def group(self, name: str, timeout_s: float = 60) -> Any:
        """A group of all ranks; each has a name of its own."""
        from fd_dsa.distributed.device import DeviceGroup
        from fd_dsa.distributed.nccl import new_unique_id

        path = self._folder / f"{name}.id"
        if self.rank == 0:
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_bytes(new_unique_id())
            unfinished.rename(path)
        while not path.exists():
            time.sleep(0.01)
        return DeviceGroup(self.rank, self.size, path.read_bytes(), self.allocate, timeout_s)

    def finish(self, result: Any) -> None:
        """Leave a result for `run_ranks`."""
        (self._folder / f"{self.rank}.json").write_text(json.dumps(result))

    def copy(self, target: Any, source: Any) -> None:
        """Queue a copy between two tensors, which a capture has too."""
        from fd_dsa.device.transfers import transfers_for

        num_bytes = int(np.prod(source.shape)) * source.element_size()
        transfers = transfers_for(source)
        transfers.copy("d2d", target.data_ptr(), source.data_ptr()).queue(num_bytes)

    def _open_torch(self) -> None:
        import torch

        torch.cuda.set_device(self.rank)
        device = torch.device("cuda", self.rank)
        self.allocate = lambda shape, dtype: torch.empty(
            shape, dtype=getattr(torch, dtype), device=device
        )

        def capture(work: Callable[[], Any]) -> Callable[[], None]:
            work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._kept = work()
            return graph.replay

        self.capture = capture

    def _open_rig(self) -> None:
        from tests.gpu_rig import load

        rig = load("real")
        import paddle

        paddle.set_device(rig.device)
        from fd_dsa.device.allocation import paddle_allocator
        from fd_dsa.runner.step_graphs import PaddleCapture

        self.allocate = paddle_allocator(rig.device)
        self.capture = lambda work: PaddleCapture(rig.place)(work)[1]
