"""Names of attention backends, and what a platform answers (`platforms/base.py`)."""

from __future__ import annotations

import enum


class _Backend(enum.Enum):
    """The values of FD_ATTENTION_BACKEND; nothing can be added to them."""

    NATIVE_ATTN = enum.auto()
    APPEND_ATTN = enum.auto()
    MLA_ATTN = enum.auto()
    DSA_ATTN = enum.auto()
    FLASH_ATTN = enum.auto()
    BLOCK_ATTN = enum.auto()
    PLAS_ATTN = enum.auto()
    HPU_ATTN = enum.auto()
    FLASH_MASK_ATTN = enum.auto()


class Platform:
    """A platform that is none of the known ones."""

    device_name = "base"

    def get_attention_backend_cls(self, selected_backend: _Backend | None) -> str:
        """Dotted name of a backend's class."""
        return ""
