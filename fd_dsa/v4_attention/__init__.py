"""DeepSeek-V4's caches and attention in host memory."""

from __future__ import annotations

from fd_dsa.v4_attention.backend import V4AttentionBackend
from fd_dsa.v4_attention.pools import V4CacheLayout

__all__ = ["V4AttentionBackend", "V4CacheLayout"]
