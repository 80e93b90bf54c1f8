"""Compilations before and after `freeze()`, on a driver that takes notes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa.errors import DeviceError, KernelUnavailable, LaunchError
from fd_dsa.runner.counters import StepCounters
from fd_dsa.startup import warm_up
from fd_dsa.triton_runtime import Pointer, freeze, num_late_compilations
from fd_dsa.triton_runtime import kernel as runtime_kernel
from tests.triton_runtime.fakes import FakeLibrary, FakeTensor, X, Y, scale_kernel

pytestmark = pytest.mark.triton


def test_warmup_leaves_nothing_to_do(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    pointer = Pointer("float32")
    compiled = kernel.warmup(pointer, pointer, 5, 0.5, True, 7, BLOCK=64)
    assert compiled is not None and compiled.name == "scale_kernel"
    assert len(library.loaded) == 1 and library.launches == []
    freeze(strict=True)
    kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    with pytest.raises(LaunchError, match=r"no compiled variant for \(x_ptr=\*fp32, y_ptr"):
        kernel[(1,)](FakeTensor(0x7004), Y, 5, 0.5, True, 7, BLOCK=64)
    kernel.warmup(Pointer("float32", aligned=False), pointer, 5, 0.5, True, 7, BLOCK=64)
    kernel[(1,)](FakeTensor(0x7004), Y, 5, 0.5, True, 7, BLOCK=64)
    assert len(library.loaded) == 2


def test_late_compilation_is_told_once(
    library: FakeLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    kernel, before = scale_kernel(), num_late_compilations()
    freeze()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    assert num_late_compilations() == before + 1
    assert len(caplog.records) == 1
    assert "kernel scale_kernel: no compiled variant" in caplog.text


class Runner:
    """A runner whose steps are one launch; every number of tokens is a variant of its own."""

    graphs = SimpleNamespace(sizes=(256,), prompts={512: None}, drafts={})
    device_steps = SimpleNamespace(finish=lambda: None)

    def __init__(self) -> None:
        self._kernel, self.counters = scale_kernel(), StepCounters()

    def step(self, num_tokens: int) -> None:
        self._kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=num_tokens)

    def warm_up(self, before_captures: bool) -> None:
        self.before_captures = before_captures
        self.step(64)

    def capture_graphs(self, sizes: Any, capture: Any, prompt_sizes: Any) -> None:
        for size in (*sizes, *prompt_sizes):
            self.step(size)


@pytest.mark.parametrize("eager", [False, True])
def test_an_engine_warns_of_what_compiles_after_its_warm_up(
    library: FakeLibrary,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    eager: bool,
) -> None:
    sizes = {"capture_sizes": (256,), "prompt_capture_sizes": (512,)}
    config = SimpleNamespace(enforce_eager=eager, **sizes)
    plan: Any = SimpleNamespace(device="gpu:0", config=config)
    monkeypatch.setattr(warm_up, "compile_forms", lambda runner: None)
    monkeypatch.setattr(warm_up, "warm_up_kernels", Runner.warm_up)
    monkeypatch.setattr(warm_up, "capture_graphs", Runner.capture_graphs)
    runners = [Runner(), Runner()]
    for runner in runners:
        warm_up.warm_up(runner, plan)
    assert len(library.loaded) == (2 if eager else 6) and not caplog.records
    # a step forks in the warm-up only if captures follow
    assert all(runner.before_captures != eager for runner in runners)
    runners[0].step(64)
    assert not caplog.records
    for _ in range(2):
        runners[0].step(256)
    assert len(caplog.records) == eager
    runners[1].step(128)
    assert "no compiled variant for (x_ptr=*fp32" in caplog.records[-1].message
    assert len(caplog.records) == eager + 1
    # the engine that started last counts
    assert [runner.counters.late_compilations for runner in runners] == [0, eager + 1]


@pytest.mark.parametrize("where", ["compile_kernel", "load"])
def test_a_kernel_that_cannot_be_made_is_named(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A caller can tell every error of the compiler from a wrong launch."""

    def fail(*_: Any) -> None:
        raise RuntimeError("ptxas died")

    owner = runtime_kernel if where == "compile_kernel" else runtime_kernel.cuda()
    monkeypatch.setattr(owner, where, fail)
    kernel = scale_kernel()
    for _ in range(2):
        with pytest.raises(KernelUnavailable, match=r"kernel scale_kernel: .*: ptxas died"):
            kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    assert library.launches == []


def test_a_full_device_is_no_fault_of_the_kernel(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise DeviceError("loading kernel scale_kernel: CUDA error 2: out of memory")

    monkeypatch.setattr(runtime_kernel.cuda(), "load", fail)
    with pytest.raises(DeviceError, match="out of memory"):
        scale_kernel()[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
