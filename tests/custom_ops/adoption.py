"""Operators that take the C ABI of a library, of kernels on a GPU or emulated on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa import custom_ops
from fd_dsa.triton_runtime import DeviceApi


class HostApi(DeviceApi):
    """Tensors in host memory, as device 0 of the library that works there."""

    def device_of(self, tensor: Any) -> int:
        return 0

    def current_stream(self, device: int) -> int:
        return 0


@contextmanager
def adopted(library: Path, monkeypatch: pytest.MonkeyPatch, *, on_gpu: bool) -> Iterator[None]:
    """Operators take the C ABI of a library inside; of one for host memory, unless `on_gpu`."""
    if not on_gpu:
        driver = SimpleNamespace(num_devices=1)
        monkeypatch.setattr("fd_dsa.triton_runtime.c_launch.cuda", lambda: driver)
        for operator in ("mla", "topk"):
            api = f"fd_dsa.ops.{operator}.custom_op.api_for_type"
            monkeypatch.setattr(api, lambda kind: HostApi())
        # kernels on emulated threads count as compiled ones
        monkeypatch.setattr("fd_dsa.ops.topk.custom_op.INTERPRETING", False)
    custom_ops.use_library(library)
    yield
    custom_ops.use_library(None)
