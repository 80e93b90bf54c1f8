"""DeepSeek-V4 decode preparation: every index list of a step, built once for all layers."""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.config import OUTPUT_SHAPES, V4PrepareConfig

__all__ = [
    "OUTPUT_SHAPES",
    "V4Arrays",
    "V4Buffers",
    "V4Prepare",
    "V4PrepareConfig",
    "V4PrepareError",
    "csa_translate",
    "fused_list",
    "v4_prepare_np",
]

_LAZY = {
    "V4Arrays": "fd_dsa.v4_prepare.host",
    "v4_prepare_np": "fd_dsa.v4_prepare.host",
    "csa_translate": "fd_dsa.v4_prepare.lists",
    "fused_list": "fd_dsa.v4_prepare.lists",
    "V4Buffers": "fd_dsa.v4_prepare.buffers",
    "V4Prepare": "fd_dsa.v4_prepare.prepare",
}


def __getattr__(name: str) -> Any:
    """Import what only some callers need on first use: the device classes need more than NumPy."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
