"""`layers/attention/mla_attention_backend.py`: a name that the runner compares classes with."""

from __future__ import annotations

from .base_attention_backend import AttentionBackend


class MLAAttentionBackend(AttentionBackend):
    """Dense attention over latents; the double has no model for it."""
