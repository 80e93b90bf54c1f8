"""Counts of what costs time on a GPU: kernel launches, waits for the device, fresh memory.

The operators of the double say `launch(name)`. Inside `watch()` every read of a tensor's values
by Python and every tensor that Python creates is an event too; the operators' own reads, which a
GPU would not see, are `quiet`. An event has the layer it fell into, and the module that caused it,
so a test can tell upstream's events from those of a plug-in.
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
        layer: the layer it fell into, None outside of layers.
        module: name of the module that caused it.
    """

    kind: str
    name: str
    layer: int | None
    module: str


_events: list[Event] = []
_layer: int | None = None
_quiet = 0
_host_memory: list[tuple[int, int]] = []


def clear() -> None:
    """Forget all events."""
    _events.clear()


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


def allocation(name: str) -> None:
    """An operator or an expression takes fresh memory that `watch` cannot see."""
    _add("allocation", name, _caller(2))


def on_host(tensor: paddle.Tensor) -> paddle.Tensor:
    """Mark memory that is on the host in the real tree too: reading it is no wait."""
    start = tensor.data_ptr()
    _host_memory.append((start, start + math.prod(tensor.shape) * tensor.element_size()))
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
        for owner, names, kind in (
            (paddle.Tensor, READS, "sync"),
            (paddle, CREATIONS, "allocation"),
        ):
            for name in names:
                original = getattr(owner, name)
                patched.append((owner, name, original))
                setattr(owner, name, _counted(kind, name, original))
        yield
    finally:
        for owner, name, original in patched:
            setattr(owner, name, original)


def _add(kind: str, name: str, module: str) -> None:
    if not _quiet:
        _events.append(Event(kind, name, _layer, module))


def _caller(depth: int) -> str:
    return sys._getframe(depth).f_globals.get("__name__", "")


def _counted(kind: str, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A method of tensors that reads one, or a function that creates one, as an event."""

    @wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        module = _caller(2)
        # one event, however many methods of Paddle it goes through
        with quiet():
            address = args[0].data_ptr() if kind == "sync" else 0
            result = original(*args, **kwargs)
        if not any(low <= address < high for low, high in _host_memory):
            _add(kind, name, module)
        return result

    return function
