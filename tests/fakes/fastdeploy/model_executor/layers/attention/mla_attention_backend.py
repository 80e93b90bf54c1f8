"""`layers/attention/mla_attention_backend.py`: a name that the runner compares classes with."""

from __future__ import annotations

from typing import Any

from .base_attention_backend import AttentionBackend


class MLAAttentionBackend(AttentionBackend):
    """Dense attention over latents; the double has no model for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def init_attention_metadata(self, forward_meta: Any) -> None:
        raise NotImplementedError
