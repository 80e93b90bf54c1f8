"""Names of attention backends (`platforms/base.py`); upstream has more."""

from __future__ import annotations

import enum


class _Backend(enum.Enum):
    """The values of FD_ATTENTION_BACKEND; nothing can be added to them."""

    APPEND_ATTN = "AppendAttentionBackend"
    MLA_ATTN = "MLAAttentionBackend"
    DSA_ATTN = "DSAAttentionBackend"
