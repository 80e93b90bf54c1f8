"""What the real operators check of their tensors: dtypes, and little else."""

from __future__ import annotations

from typing import Any


def dtype_of(tensor: Any) -> str:
    """The dtype's name, without the package's."""
    return str(tensor.dtype).rpartition(".")[2]


def check_dtypes(op: str, expected: str, **tensors: Any) -> None:
    """Raise ValueError unless all tensors have the dtype, or one of several parted by "|"."""
    for name, tensor in tensors.items():
        if dtype_of(tensor) not in expected.split("|"):
            raise ValueError(f"{op}: {name} is {dtype_of(tensor)}, the kernel takes {expected}")
