"""Devices that a name means on this machine, and the errors if a device is missing."""

from __future__ import annotations

from typing import Any

import paddle
import pytest
from paddle.base import core

from fd_dsa.device.resolve import (
    device_of_rank,
    free_device_bytes,
    keep_float32,
    resolve_device,
)
from fd_dsa.errors import BackendUnavailable, ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Let Paddle be a build for GPUs that sees this many; None = a build for CPUs."""

    def pretend(count: int | None) -> None:
        monkeypatch.setattr(paddle.device, "is_compiled_with_cuda", lambda: count is not None)
        monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: count or 0)

    return pretend


@pytest.mark.parametrize(
    ("name", "count", "device"),
    [
        ("cpu", 2, "cpu"),
        ("auto", None, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 1, "gpu:0"),
        ("gpu", 2, "gpu:0"),
        ("gpu:0", 1, "gpu:0"),
    ],
)
def test_names(gpus, name: str, count: int | None, device: str) -> None:
    gpus(count)
    assert resolve_device(name) == device


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("gpu", None, "built for CPUs; install paddlepaddle-gpu"),
        ("gpu", 0, "Paddle sees no GPU; check the driver"),
        ("gpu:1", 2, "choose the GPU by CUDA_VISIBLE_DEVICES"),
        ("abacus:0", None, "abacus:0"),
    ],
)
def test_refusals_say_what_to_do(gpus, name: str, count: int | None, said: str) -> None:
    gpus(count)
    with pytest.raises(BackendUnavailable, match=said):
        resolve_device(name)


def test_each_rank_has_a_device_of_its_own(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(4)
    chosen: list[str] = []
    monkeypatch.setattr(paddle.device, "set_device", chosen.append)
    assert [device_of_rank("cpu", rank, 2) for rank in range(2)] == ["cpu", "cpu"]
    assert [device_of_rank("gpu:0", rank, 4) for rank in range(4)] == chosen
    assert chosen == ["gpu:0", "gpu:1", "gpu:2", "gpu:3"]
    with pytest.raises(ConfigError, match="-size: got 8, allowed: at most 4, the devices 'gpu'"):
        device_of_rank("gpu:0", 0, 8)
    with pytest.raises(ConfigError, match="allowed: at most 0, the devices 'abacus'"):
        device_of_rank("abacus:0", 0, 2)


@pytest.mark.parametrize(("device", "allowed"), [("cpu", True), ("gpu:0", False)])
def test_float32_is_not_tf32_on_a_gpu(device: str, allowed: bool) -> None:
    core.set_cublas_switch(True)
    try:
        keep_float32(device)
        assert core.get_cublas_switch() is allowed
    finally:
        core.set_cublas_switch(True)


def test_the_memory_of_a_cpu_is_the_systems_own() -> None:
    assert free_device_bytes("cpu") is None


@pytest.mark.triton
@pytest.mark.parametrize(
    ("device", "share", "free"),
    [("gpu", 1.0, 6000), ("gpu:0", 0.75, 3500), ("gpu:1", 1.0, 500), ("gpu:1", 0.5, 0)],
)
def test_the_free_memory_of_a_gpu_is_within_a_share(
    monkeypatch: pytest.MonkeyPatch, device: str, share: float, free: int
) -> None:
    from tests.triton_runtime.fakes import FakeLibrary, driven_by

    library = FakeLibrary(num_devices=2)

    def memory(free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = (500 if library.context() == 0x1001 else 6000), 10_000
        return 0

    monkeypatch.setattr(library, "cuMemGetInfo_v2", memory)
    monkeypatch.setattr("fd_dsa.triton_runtime.INTERPRETING", False)
    with driven_by(library):
        assert free_device_bytes(device, share) == free
