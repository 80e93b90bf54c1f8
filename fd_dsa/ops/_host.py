"""Zero-copy crossing between Paddle CPU tensors and NumPy, and scratch memory that is kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.errors import DtypeError, ShapeError


def as_numpy(array: Any) -> np.ndarray:
    """NumPy view of a NumPy array or a Paddle CPU tensor; writes go to the same memory."""
    return array if isinstance(array, np.ndarray) else np.from_dlpack(array)


def as_tensor(array: np.ndarray) -> Any:
    """Paddle CPU tensor on the memory of a writable NumPy array."""
    from paddle.utils.dlpack import from_dlpack

    return from_dlpack(array)


def check_shape(operator: str, argument: str, found: Any, allowed: tuple[int | None, ...]) -> None:
    """Raise ShapeError unless `found.shape` fits `allowed` (None = any extent)."""
    shape = tuple(found.shape)
    if len(shape) != len(allowed) or any(
        a is not None and s != a for s, a in zip(shape, allowed, strict=True)
    ):
        wanted = "[" + ", ".join("*" if a is None else str(a) for a in allowed) + "]"
        raise ShapeError(f"{operator}: {argument} has shape {list(shape)}, allowed is {wanted}")


def check_dtype(operator: str, argument: str, found: Any, allowed: tuple[str, ...]) -> None:
    """Raise DtypeError unless the dtype of `found` is one of `allowed`."""
    name = str(found.dtype).removeprefix("paddle.")
    if name not in allowed:
        raise DtypeError(
            f"{operator}: {argument} has dtype {name}, allowed is {' or '.join(allowed)}"
        )


class Scratch:
    """Named float32 (or other) buffers that grow and are then reused, so a step allocates none."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """Uninitialised C-contiguous array of `shape`; valid until the same name is taken again."""
        size = int(np.prod(shape, dtype=np.int64))
        key = (name, np.dtype(dtype).str)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, 1), dtype)
            self._buffers[key] = buffer
        return buffer[:size].reshape(shape)
