"""Runners of models with the layers of DeepSeek-V3.2."""

from __future__ import annotations

from typing import Any

from fd_dsa.attention import CacheLayout, DSAAttentionBackend
from fd_dsa.engine.caches import backend_config
from fd_dsa.runner import InputBatch, ModelRunner


def dsa_runner(
    model: Any,
    batch: InputBatch,
    layout: CacheLayout,
    num_blocks: int,
    device: str = "cpu",
    *,
    dtype: str = "float32",
    max_drafts: int = 0,
    kind: type[ModelRunner] = ModelRunner,
) -> Any:
    """A runner over caches of some blocks."""
    sizes = backend_config(model.config, layout, batch, num_blocks, dtype)
    backend = DSAAttentionBackend(sizes, device, group=model.group)
    return kind(model, batch, backend, device, max_drafts)
