"""Attention and caches of DeepSeek-V4 in host memory."""

from __future__ import annotations

from fd_dsa.v4_attention.backend import V4AttentionBackend

__all__ = ["V4AttentionBackend"]
