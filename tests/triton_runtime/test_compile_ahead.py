"""Kernels that processes compile, on a driver that takes notes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.triton_runtime import compile_ahead
from fd_dsa.triton_runtime.compile_ahead import MODE, CompileAhead, Order
from tests.compiling import output_of
from tests.triton_runtime.fakes import FakeLibrary, X, Y, in_threads, scale_kernel

pytestmark = pytest.mark.triton

SCRIPT = """
import json, os
from fd_dsa.errors import KernelUnavailable
from fd_dsa.ops.fill_kernels import fill_constant, fill_kernel
from fd_dsa.ops.slot_copy import copy_slot_kernel
from fd_dsa.triton_runtime import compile_ahead, register_device_api
from tests.triton_runtime.fakes import FakeApi, FakeLibrary, FakeTensor, X, driven_by, scale_kernel

def cached():
    return sorted(os.listdir(os.environ["TRITON_CACHE_DIR"]))

def wrong():
    copy_slot_kernel[(1,)](X, 0, 1, 2, SIZE=64, TILE=48)

register_device_api(FakeTensor, FakeApi())
# the place in the cache is that of this process
fill_kernel.fn.hash = "another key"
with driven_by(FakeLibrary(codes="Qiiiff")) as library:
    with compile_ahead(2) as ahead:
        for _ in range(3):
            fill_constant(X, 0, 64, 1.0)
        wrong()
        scale_kernel()[(1,)](X, X, 5, 0.5, True, 7, BLOCK=64)
    counts = ahead.num_kernels, ahead.num_workers, len(library.launches), len(library.loaded)
    before = cached()
    fill_constant(X, 0, 64, 1.0)
    is_found = cached() == before
    try:
        wrong()
        error = ""
    except KernelUnavailable as raised:
        error = str(raised)
    print(json.dumps([counts, ahead.errors, len(before), is_found, len(library.launches), error]))
"""


def test_processes_compile_and_launches_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    counts, errors, num_cached, is_found, launches, error = json.loads(output_of(SCRIPT))
    # one kernel for three launches, one that Triton refuses, and one of no module
    assert counts == [3, 2, 0, 0]
    assert num_cached and is_found and launches == 1
    texts = "".join(errors)
    assert len(errors) == 2 and "kernel scale_kernel: AttributeError" in texts
    # the launch raises the compiler's error as without processes
    assert "cannot be compiled" in error and "kernel copy_slot_kernel: Compilation" in texts


def order() -> Order:
    """Return an order that no process reads."""
    return Order("module", "name", "key", {}, {}, 90)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        # the process ends before, in or after the order
        ((sys.executable, "-c", ""), "BrokenPipeError|ConnectionResetError|EOFError"),
        (("/no/such/program",), "FileNotFoundError"),
    ],
)
def test_a_process_that_ends_is_an_error_of_its_kernels(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], problem: str
) -> None:
    monkeypatch.setattr(CompileAhead, "COMMAND", command)
    with compile_ahead(2) as ahead:
        for _ in range(3):
            ahead.add(order())
    assert len(ahead.errors) == 3
    for error in ahead.errors:
        assert re.match(f"kernel name: .*({problem})", error), error


def test_a_bound_launch_waits_for_its_inputs(library: FakeLibrary) -> None:
    launch = scale_kernel().bind((1,), X, Y, 5, 0.5, True, 7, BLOCK=64)
    with compile_ahead(1):
        launch()
    assert library.launches == []
    launch()
    assert len(library.launches) == 1


def test_only_the_thread_of_the_call_compiles() -> None:
    found: list[Any] = []
    with compile_ahead(1):
        in_threads(lambda _: found.append(MODE.ahead is not None), 1)
        assert MODE.ahead is not None
    assert found == [False] and MODE.ahead is None


def test_an_error_inside_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    # it never answers
    sleep = "import time; time.sleep(600)"
    monkeypatch.setattr(CompileAhead, "COMMAND", (sys.executable, "-c", sleep))
    with pytest.raises(ValueError, match="wrong"), compile_ahead(2) as ahead:
        for _ in range(3):
            ahead.add(order())
        raise ValueError("wrong")
    assert MODE.ahead is None
