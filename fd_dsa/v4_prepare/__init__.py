"""DeepSeek-V4 decode preparation: all index lists of a step, built once."""

from __future__ import annotations

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.builder import V4Arrays, csa_translate, v4_prepare_np
from fd_dsa.v4_prepare.config import OUTPUT_SHAPES, V4PrepareConfig
from fd_dsa.v4_prepare.prepare import V4Prepare

__all__ = [
    "OUTPUT_SHAPES",
    "V4Arrays",
    "V4Prepare",
    "V4PrepareConfig",
    "V4PrepareError",
    "csa_translate",
    "v4_prepare_np",
]
