"""Memory that its owner has given up: poisoned, and never handed out again.

A GPU's allocator would give the same address to somebody else. Here a later reader finds
e4m3 codes and float32 scales that are NaN, and a graph that captured it refuses to replay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdeploy._arrays import writable

POISON = 0xFF
_freed: dict[int, Any] = {}


def free(tensor: Any) -> None:
    """Give up a uint8 tensor."""
    with writable(tensor) as values:
        values[...] = np.uint8(POISON)
    # kept, so that the address stays its own
    _freed[tensor.data_ptr()] = tensor


def is_freed(address: int) -> bool:
    """Return True if a tensor that began here was given up."""
    return address in _freed
