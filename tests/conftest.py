"""Fixtures of all tests: skips with a reason where a machine lacks something, and a summary.

`pytest` needs no GPU: tests whose marker asks for something that is missing here are skipped.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from fd_dsa.environment import choose_triton_mode
from tests import time_limit
from tests.gpu_rig.session import open_session, skip_reason

# before any test module imports Triton, alone or through torch
choose_triton_mode()
# A shell without job control lets its background processes ignore SIGINT, and their children too.
# A server that a test interrupts would then never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GPU_MARKERS = ("gpu", "gpu_rig")

# a failure prints how to see it again; a slow machine is no failure
settings.register_profile(
    "fd_dsa", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# `make soak` draws more cases (tests/strategies.py)
settings.register_profile("soak", settings.get_profile("fd_dsa"), max_examples=1000)
# under a memory checker every launch takes a hundred times as long
settings.register_profile("brief", settings.get_profile("fd_dsa"), max_examples=5)
settings.load_profile("fd_dsa")


def _has_gpu() -> bool:
    """True where the NVIDIA driver shows a device."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


if not _has_gpu():
    # Triton reads it when it is first imported, so it is set before any test module is
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _missing(*modules: str) -> str | None:
    """The reason to skip when one of these packages is not installed; nothing is imported."""
    absent = [name for name in modules if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _no_gpu(*modules: str) -> str | None:
    """The reason to skip a test that needs a GPU and these packages."""
    return _missing(*modules) if _has_gpu() else "no NVIDIA GPU on this machine"


# marker -> why its tests cannot run here, None where they can
REQUIREMENTS: dict[str, Callable[[], str | None]] = {
    "gpu": lambda: _no_gpu("torch", "triton"),
    "gpu_rig": lambda: skip_reason() or _missing("paddle", "triton"),
    "triton": lambda: _missing("triton"),
    "fastdeploy": lambda: _missing("fastdeploy"),
    "oracle": lambda: _missing("torch", "transformers"),
}
_skip_reason = cache(lambda marker: REQUIREMENTS[marker]())


def pytest_configure(config: pytest.Config) -> None:
    """Load the test plug-in in a session that asks for it, before anything imports Paddle."""
    # the modules of all tests stay: looking through them for garbage takes a fifth of their load
    gc.disable()
    _take_a_processor(os.environ.get("PYTEST_XDIST_WORKER", ""))
    open_session(config.option.markexpr)


def _take_a_processor(worker: str) -> None:
    """Keep a worker of many, and what it starts, to one processor of its own.

    An engine takes a thread for every processor, and its threads wait for each other by spinning:
    two workers' engines on the same two processors take each other's time.
    """
    if worker:
        processors = sorted(os.sched_getaffinity(0))
        number = int(worker.removeprefix("gw"))
        os.sched_setaffinity(0, {processors[number % len(processors)]})


MEMORIES = {"interpreter": "triton", "torch": "gpu", "rig": "gpu_rig"}


@pytest.fixture(
    params=[pytest.param(m, marks=getattr(pytest.mark, k)) for m, k in MEMORIES.items()]
)
def kernel_memory(request: pytest.FixtureRequest) -> Any:
    """A memory that kernels run on (tests/kernel_memory.py): one run of the test for each."""
    from tests.kernel_memory import open_memory

    return open_memory(request.param)


# those that hold Paddle's tensors
PADDLE_MEMORIES = [
    pytest.param(m, marks=getattr(pytest.mark, MEMORIES[m])) for m in ("interpreter", "rig")
]


@pytest.fixture(params=PADDLE_MEMORIES)
def paddle_memory(request: pytest.FixtureRequest) -> Any:
    """As `kernel_memory`, for operators that make their results by Paddle."""
    from tests.kernel_memory import open_memory

    return open_memory(request.param)


@pytest.fixture
def fresh_choices() -> Iterator[None]:
    """Operators choose their providers again, and forget these choices after the test."""
    from fd_dsa.ops.providers import asking_for

    with asking_for({}):
        yield


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FD_DSA_BATCH_INVARIANT=1, which a process otherwise reads once."""
    from fd_dsa.ops.fixed_order import fixed_order

    monkeypatch.setenv("FD_DSA_BATCH_INVARIANT", "1")
    if find_spec("triton"):
        _sum_in_doubles(monkeypatch)
    fixed_order.cache_clear()
    yield
    fixed_order.cache_clear()


def _sum_in_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted GEMMs of a tile, whose bits NumPy lets depend on where in the tile a row is.

    OpenBLAS does with its kernels for Haswell. Sums in doubles are exact, or nearly so.
    """
    from triton.language import float64
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    dot = builder.create_dot

    def create_dot(a: Any, b: Any, start: Any, *how: Any) -> Any:
        found = dot(a, b, TensorHandle(start.data.astype("float64"), float64), *how)
        return TensorHandle(found.data.astype(start.data.dtype), start.dtype.scalar)

    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture(autouse=True, scope="module")
def kept_objects() -> None:
    """Keep what earlier modules leave out of collections, which would get longer and longer.

    Tests that look for objects of theirs find these fast, too.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """Our log as a process has it at first: `register` and `fd-dsa chat` change it for theirs.

    Not as the test found it: a fixture of a whole module may have changed it before.
    """
    yield
    package = logging.getLogger("fd_dsa")
    package.setLevel(logging.NOTSET)
    package.handlers.clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run here; `network` tests run only when they are asked for by name.

    Files with slow tests come first, longest limits before others. So no process works on alone
    at the end.
    """
    limits: dict[Path, float] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            limit = item.get_closest_marker("timeout")
            seconds = limit.args[0] if limit else 1.0
            limits[item.path] = max(seconds, limits.get(item.path, 0))
    root = config.rootpath
    turns = {path: time_limit.turn(str(path.relative_to(root))) for path in limits}
    items.sort(key=lambda item: (-limits.get(item.path, 0), turns.get(item.path, 0)))
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        reasons = [_skip_reason(name) for name in names & REQUIREMENTS.keys()]
        if "network" in names and "network" not in config.option.markexpr:
            reasons.append("needs a package index; select it with -m network")
        for reason in filter(None, reasons):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup() -> None:
    """Skip what begins too late."""
    time_limit.skip_if_late()


def parity_mode() -> str:
    """Return in words how this machine compares with Hugging Face."""
    missing = _skip_reason("oracle")
    if missing:
        return f"from the committed goldens ({missing})"
    return f"live (torch {version('torch')}, transformers {version('transformers')}) and goldens"


def pytest_collection_finish() -> None:
    """Poison results, and spare work of interpreted kernels, where a test module has kernels."""
    # what is loaded now stays: it need not be looked through for garbage again and again
    gc.freeze()
    gc.enable()
    if sys.modules.get("paddle"):
        from tests.kernel_memory import poison_results

        poison_results()
    if choose_triton_mode() and "triton.runtime.interpreter" in sys.modules:
        from tests.quick_interpreter import hurry

        hurry()


def pytest_sessionfinish() -> None:
    """Let the process free what it loaded: a module of C++ warns of objects that are left."""
    gc.unfreeze()


def pytest_report_header() -> str:
    """The mode of the parity tests, before they run."""
    return f"parity with Hugging Face: {parity_mode()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The mode of the parity tests, and how many tests this machine could not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    # a module that skips itself has no keywords
    marks = [getattr(report, "keywords", ()) for report in skipped]
    num_gpu = sum(any(name in found for name in GPU_MARKERS) for found in marks)
    terminalreporter.section("what ran here")
    terminalreporter.write_line(f"parity with Hugging Face: {parity_mode()}")
    terminalreporter.write_line(f"GPU tests skipped: {num_gpu}")
    num_late = sum(time_limit.REASON in str(report.longrepr) for report in skipped)
    if num_late:
        terminalreporter.write_line(f"tests {time_limit.REASON}: {num_late}", red=True)
