"""Copies and waits that `fd_dsa.triton_runtime` makes by itself, which the plug-in cannot see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def family(base: type) -> list[type]:
    """A class and all that derive from it."""
    return [base, *(child for direct in base.__subclasses__() for child in family(direct))]


@contextmanager
def replaced(base: type, name: str, change: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """A method is `change(method)` inside the block, wherever one of the family has it."""
    originals = [(kind, vars(kind)[name]) for kind in family(base) if name in vars(kind)]
    for kind, method in originals:
        setattr(kind, name, change(method))
    try:
        yield
    finally:
        for kind, method in originals:
            setattr(kind, name, method)


@contextmanager
def counted_transfers() -> Iterator[Counter[str]]:
    """Count the launcher's copies and waits inside the block, under the plug-in's names."""
    from fd_dsa.device.transfers import Event, FixedCopy

    counts: Counter[str] = Counter()

    def counting_queue(original: Callable[..., Any]) -> Any:
        def queue(self: Any, num_bytes: int) -> Any:
            counts[f"{self.kind}_async"] += 1
            counts[f"{self.kind}_bytes"] += num_bytes
            return original(self, num_bytes)

        return queue

    def counting_wait(original: Callable[..., Any]) -> Any:
        def wait(self: Any) -> Any:
            counts["event_syncs"] += 1
            return original(self)

        return wait

    with (
        replaced(FixedCopy, "queue", counting_queue),
        replaced(Event, "wait", counting_wait),
    ):
        yield counts
