"""Who serves an operator, decided by where its tensors lie, and told once."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.errors import BackendUnavailable
from fd_dsa.ops import _provider
from fd_dsa.ops._provider import provider_for, provider_reason, provider_table


class Place:
    """A place as Paddle describes it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __str__(self) -> str:
        return f"Place({self.kind}:0)"

    def is_cpu_place(self) -> bool:
        return self.kind == "cpu"

    def is_gpu_place(self) -> bool:
        return self.kind == "gpu"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice made before this test."""
    monkeypatch.setattr(_provider, "_choices", {})
    monkeypatch.setattr(_provider, "_against", {})


def on(kind: str) -> Any:
    """A tensor on a device, as far as it is looked at."""
    return SimpleNamespace(place=Place(kind))


@pytest.mark.parametrize("tensor", [np.zeros(1), paddle.zeros([1])], ids=["numpy", "paddle"])
def test_a_cpu(tensor: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        assert [provider_for("cache_write", tensor) for _ in range(3)] == ["paddle"] * 3
    (record,) = caplog.records
    assert "cache_write on cpu: paddle" in record.getMessage()
    assert provider_table() == {"cache_write": {"cpu": "paddle"}}


@pytest.mark.parametrize("kind", ["gpu", "hopper"])
def test_other_places_need_a_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_provider, "find_spec", {"fd_dsa.ops.topk.triton_kernel": 1}.get)
    assert provider_for("topk", on(kind)) == "triton"
    with pytest.raises(BackendUnavailable, match=rf"cache_write: no kernel .*'{kind}'"):
        provider_for("cache_write", on(kind))
    assert provider_table() == {"topk": {kind: "triton"}}


@pytest.mark.parametrize(("mode", "said"), [("1", "an interpreted"), ("0", "a compiled")])
def test_the_reason_says_how_a_kernel_runs(
    mode: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", mode)
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        provider_for("topk", on("hopper"))
    (record,) = caplog.records
    assert record.getMessage() == f"topk on hopper: triton (a device, {said} Triton kernel)"
    assert provider_reason("triton").endswith(f"{said} Triton kernel")


def test_memory_of_torch() -> None:
    tensor = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert provider_for("topk", tensor) == "triton"
    assert provider_table() == {"topk": {"cuda": "triton"}}
