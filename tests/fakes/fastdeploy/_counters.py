"""Counts of what costs time on a GPU: kernel launches, waits for the device, fresh memory.

The operators of the double say `launch(name)`. Inside `watch()` every read of a tensor's values
by Python and every tensor that Python creates is an event too; the operators' own reads, which a
GPU would not see, are `quiet`. An event has the step and the layer it fell into, and the module
that caused it, so a test can tell upstream's events from those of a plug-in.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import paddle

READS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy")
READS += ("tolist",)
CREATIONS = ("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like")
CREATIONS += ("to_tensor", "zeros", "zeros_like")

# the graph engine sets it while it records; upstream's operators skip their waits then
capturing = False


@dataclass(frozen=True)
class Event:
    """One launch, wait or allocation.

    Attributes:
        kind: "launch", "sync" or "allocation".
        name: the operator, the tensor's method, or Paddle's function.
        step: steps begun before it.
        layer: the layer it fell into, None outside of layers.
        module: name of the module that caused it.
        size: bytes of an allocation.
    """

    kind: str
    name: str
    step: int
    layer: int | None
    module: str
    size: int = 0


_events: list[Event] = []
_step = 0
_layer: int | None = None
_quiet = 0
_host_memory: list[tuple[int, int]] = []


def clear() -> None:
    """Forget all events; the next step is the first."""
    global _step
    _events.clear()
    _step = 0


def begin_step() -> None:
    """All that follows falls into a new step."""
    global _step
    _step += 1


@contextmanager
def layer(layer_id: int) -> Iterator[None]:
    """What happens inside falls into this layer."""
    global _layer
    before, _layer = _layer, layer_id
    try:
        yield
    finally:
        _layer = before


@contextmanager
def quiet() -> Iterator[None]:
    """What happens inside is no event: an operator works with its tensors' memory."""
    global _quiet
    _quiet += 1
    try:
        yield
    finally:
        _quiet -= 1


def launch(name: str) -> None:
    """An operator starts a kernel."""
    _add("launch", name, _caller(2))


def sync(name: str) -> None:
    """An operator waits for the device."""
    _add("sync", name, _caller(2))


def allocation(name: str, size: int = 0) -> None:
    """An operator or an expression takes fresh memory, `size` bytes, that `watch` cannot see."""
    _add("allocation", name, _caller(2), size)


def on_host(tensor: paddle.Tensor) -> paddle.Tensor:
    """Mark memory that is on the host in the real tree too: reading it is no wait."""
    start = tensor.data_ptr()
    _host_memory.append((start, start + _num_bytes(tensor)))
    return tensor


def events(kind: str, name: str | None = None, module: str = "") -> list[Event]:
    """Events of a kind in order, by name and by the beginning of the module's name."""
    return [
        event
        for event in _events
        if event.kind == kind
        and (name is None or event.name == name)
        and event.module.startswith(module)
    ]


@contextmanager
def watch() -> Iterator[None]:
    """Reads of tensors by Python are "sync" events inside, tensors it creates "allocation"s."""
    patched: list[tuple[Any, str, Any]] = []
    try:
        for owner, names, counted in (
            (paddle.Tensor, READS, _counted_read),
            (paddle, CREATIONS, _counted_creation),
        ):
            for name in names:
                original = getattr(owner, name)
                patched.append((owner, name, original))
                setattr(owner, name, counted(name, original))
        yield
    finally:
        for owner, name, original in patched:
            setattr(owner, name, original)


def _add(kind: str, name: str, module: str, size: int = 0) -> None:
    if not _quiet:
        _events.append(Event(kind, name, _step, _layer, module, size))


def _num_bytes(tensor: paddle.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _caller(depth: int) -> str:
    return sys._getframe(depth).f_globals.get("__name__", "")


def _lies_on_host(tensor: paddle.Tensor) -> bool:
    start = tensor.data_ptr()
    return any(low <= start < high for low, high in _host_memory)


def _counted_read(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def method(self: paddle.Tensor, *args: Any, **kwargs: Any) -> Any:
        module = _caller(2)
        # one read, however many methods of Paddle it goes through
        with quiet():
            counted = not _lies_on_host(self)
            result = original(self, *args, **kwargs)
        if counted:
            _add("sync", name, module)
        return result

    return method


def _counted_creation(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        module = _caller(2)
        with quiet():
            result = original(*args, **kwargs)
        _add("allocation", name, module, _num_bytes(result))
        return result

    return function
