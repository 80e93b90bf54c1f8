"""Copies and waits that `fd_dsa.triton_runtime` makes by itself, which the plug-in cannot see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# method -> the plug-in's names for one call, and for the bytes of the NumPy array it is given
_COPIES = {"to_device": ("h2d_async", "h2d_bytes"), "to_host": ("d2h_async", "d2h_bytes")}


def _family(base: type) -> list[type]:
    """A class and all that derive from it."""
    return [base, *(child for direct in base.__subclasses__() for child in _family(direct))]


@contextmanager
def counted_transfers() -> Iterator[Counter[str]]:
    """Count the launcher's copies and waits inside the block, under the plug-in's names."""
    import numpy as np

    from fd_dsa.triton_runtime.transfers import Event, Transfers

    counts: Counter[str] = Counter()

    def counting_copy(original: Callable[..., Any], calls: str, size: str) -> Callable[..., Any]:
        def copy(self: Any, *args: Any) -> Any:
            counts[calls] += 1
            counts[size] += sum(a.nbytes for a in args if isinstance(a, np.ndarray))
            return original(self, *args)

        return copy

    def counting_wait(original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(self: Any) -> Any:
            counts["event_syncs"] += 1
            return original(self)

        return wait

    replaced = []
    for kind in _family(Transfers):
        for name in vars(kind).keys() & _COPIES.keys():
            replaced.append((kind, name, counting_copy(vars(kind)[name], *_COPIES[name])))
    for kind in _family(Event):
        if "wait" in vars(kind):
            replaced.append((kind, "wait", counting_wait(vars(kind)["wait"])))
    originals = [(kind, name, vars(kind)[name]) for kind, name, _ in replaced]
    for kind, name, method in replaced:
        setattr(kind, name, method)
    try:
        yield counts
    finally:
        for kind, name, method in originals:
            setattr(kind, name, method)
