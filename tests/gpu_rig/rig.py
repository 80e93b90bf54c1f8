"""Loads a form of the plug-in into this process, counts what it does, captures graphs.

rig = load("guard")                     # before anything imports Paddle
with rig.counting() as counted:
    step()
assert counted.delta == {}              # no copy, no wait, no memory
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu_rig.build import CUDA_FOLDER, LIBRARY, build
from tests.gpu_rig.transfers import counted_transfers

DEVICE_TYPE = "hopper"
CUBLAS = "libcublas.so.13"
_POINTER = ctypes.c_void_p


class RigError(RuntimeError):
    """The plug-in cannot be loaded, or a call of the CUDA runtime failed."""


@dataclass
class Counted:
    """Counts of the plug-in inside a `counting()` block, filled when the block ends.

    Attributes:
        delta: counters that changed, by how much; the launcher's own copies and waits are in
            them. `peak_bytes` is device memory that Paddle's
            allocator gave out above what was in use at the start, from its own pool as well.
    """

    delta: dict[str, int] = field(default_factory=dict)


class Capture:
    """The graph of a `capture()` block, once the block has ended.

    Attributes:
        num_nodes: of the graph.
        work: kept as long as the graph, because replays use the memory that it holds.
    """

    num_nodes = 0
    work: Callable[[], Any] | None = None

    def __init__(self, rig: Rig) -> None:
        self._rig, self._graph = rig, _POINTER()

    def end(self, stream: _POINTER) -> None:
        """End the capture of a stream. The graph lives as long as the process."""
        count = ctypes.c_size_t()
        self._rig.check("rig_capture_end", stream, ctypes.byref(self._graph), ctypes.byref(count))
        self.num_nodes = count.value

    def replay(self) -> None:
        """Queue the captured work on Paddle's current stream; returns at once."""
        if not self._graph:
            raise RigError("nothing captured yet; replay after the block")
        self._rig.check("rig_graph_launch", self._graph, self._rig.stream())


class Rig:
    """The plug-in in this process: its form, its place, its counters and its helpers."""

    def __init__(self, form: str, folder: Path) -> None:
        import paddle

        self.form = form
        if DEVICE_TYPE not in paddle.device.get_all_custom_device_type():
            raise RigError(f"Paddle did not take {folder / LIBRARY}; GLOG_minloglevel=0 says why")
        if paddle.framework.core.get_custom_device_count(DEVICE_TYPE) == 0:
            raise RigError("the plug-in sees no NVIDIA GPU")
        self.place = paddle.CustomPlace(DEVICE_TYPE, 0)
        # a plug-in's device becomes the default of the process; a test asks for it
        paddle.set_device("cpu")
        self._library = ctypes.CDLL(str(folder / LIBRARY))
        self._library.rig_counter_names.restype = ctypes.c_char_p
        self._library.rig_readable.restype = _POINTER
        self._library.rig_readable.argtypes = [_POINTER]
        self._names = self._library.rig_counter_names().decode().strip(",").split(",")

    @property
    def device(self) -> str:
        """The device as a `device` argument takes it: "hopper:0"."""
        return f"{DEVICE_TYPE}:0"

    @property
    def is_real(self) -> bool:
        """True if the memory is CUDA memory."""
        return self.form == "real"

    def stream(self) -> _POINTER:
        """Handle of Paddle's current stream on the device."""
        from paddle.base import core

        return _POINTER(core._get_current_custom_device_stream(DEVICE_TYPE, 0).raw_stream)

    def readable(self, pointer: int) -> int:
        """Address under which host code of a fake or guard form reaches a device address."""
        return self._library.rig_readable(pointer) or 0

    def counters(self) -> dict[str, int]:
        """All counters since the start of the process."""
        values = (ctypes.c_int64 * len(self._names))()
        self._library.rig_read_counters(values)
        return dict(zip(self._names, values, strict=True))

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """Count copies, waits, allocations and registered kernels inside a block."""
        from paddle.base import core

        counted = Counted()
        core.device_memory_stat_reset_peak_value("Allocated", 0)
        in_use = core.device_memory_stat_current_value("Allocated", 0)
        before = self.counters()
        with counted_transfers() as transfers:
            yield counted
        changes = {name: now - before[name] for name, now in self.counters().items()}
        changes = transfers + Counter(changes)
        changes["peak_bytes"] = core.device_memory_stat_peak_value("Allocated", 0) - in_use
        counted.delta = {name: change for name, change in changes.items() if change}

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Inside the block an operator without a kernel of the plug-in raises, never falls back."""
        import paddle

        flag = "FLAGS_enable_api_kernel_fallback"
        before = paddle.get_flags([flag])
        paddle.set_flags({flag: False})
        try:
            yield
        finally:
            paddle.set_flags(before)

    def check(self, name: str, *arguments: Any) -> None:
        """Call a helper of the real form that answers with a CUDA error.

        Raises:
            RigError: the form has no such helper, or the call failed; names both.
        """
        if not self.is_real:
            raise RigError(f"{name} needs the real form, this process has {self.form!r}")
        error = getattr(self._library, name)(*arguments)
        if error:
            self._library.rig_error_text.restype = ctypes.c_char_p
            raise RigError(f"{name}: {self._library.rig_error_text(error).decode()}")

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """Capture what the block queues on Paddle's current stream, by the CUDA runtime alone.

        Unlike Paddle's own capture, a failed one raises and the process can go on.
        """
        capture, stream = Capture(self), self.stream()
        self.check("rig_capture_begin", stream)
        try:
            yield capture
        except BaseException:
            # the stream must leave capture mode; the first error is the one to show
            with suppress(RigError):
                capture.end(stream)
            raise
        capture.end(stream)

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work` as a graph: calling the result replays it. It runs once before the capture.

        The forms without a GPU have no graphs: there the result is `work` itself, so that all
        else of a test of graphs runs on them too.
        """
        work()
        if not self.is_real:
            return work
        with self.capture() as capture:
            work()
        capture.work = work
        return capture.replay


def _find_cublas() -> Path | None:
    """The library in CUDA's folder or in NVIDIA's wheels; None leaves it to the loader."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), CUDA_FOLDER) if home]
    folders = [home / "lib64" for home in homes]
    folders += [wheel for path in sys.path for wheel in sorted(Path(path).glob("nvidia/*/lib"))]
    return next((folder / CUBLAS for folder in folders if (folder / CUBLAS).is_file()), None)


_loaded: Rig | None = None


def current() -> Rig | None:
    """The form that this process has loaded, None without one."""
    return _loaded


def load(form: str) -> Rig:
    """Build a form if needed and make it this process's device "hopper".

    Args:
        form: "fake", "guard", "null" or "real".

    Raises:
        BuildError: it cannot be built here.
        RigError: Paddle was imported before, another form is loaded, or there is no GPU.
    """
    global _loaded
    if _loaded is not None:
        if _loaded.form != form:
            raise RigError(f"this process has the form {_loaded.form!r}, asked for {form!r}")
        return _loaded
    if "paddle" in sys.modules:
        raise RigError("Paddle is imported already and reads its plug-ins only once; load first")
    folder = build(form)
    os.environ["CUSTOM_DEVICE_ROOT"] = str(folder)
    # Paddle logs every plug-in it loads, and each callback that is optional and absent
    os.environ.setdefault("GLOG_minloglevel", "2")
    cublas = _find_cublas() if form == "real" else None
    if cublas is not None:
        os.environ.setdefault("RIG_CUBLAS", str(cublas))
    rig = Rig(form, folder)
    if form in ("fake", "guard"):
        from tests.gpu_rig.interpreted import register

        register(rig)
    _loaded = rig
    return rig
