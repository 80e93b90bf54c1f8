"""Operators of DeepSeek Sparse Attention on Paddle tensors, on a CPU or a GPU; docs/operators.md.

Each name of `__all__` is a function that checks its inputs and calls the provider that the table of
`fd_dsa.ops.providers` names. They are loaded on first use: importing this needs no Paddle.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# name -> module and name there
_FUNCTIONS = {
    "step_metadata": ("metadata", "step_metadata"),
    "position_ids": ("positions", "position_ids"),
    "write_caches": ("cache_write", "write_caches"),
    "indexer_query": ("query", "indexer_query"),
    "indexer_logits": ("logits", "indexer_logits"),
    "topk_indices": ("topk", "topk_indices"),
    "sparse_mla": ("mla", "sparse_mla"),
    "dequantize": ("mla", "dequantize"),
    "CacheWriteParams": ("cache_write", "CacheWriteParams"),
}
__all__ = list(_FUNCTIONS)


def __getattr__(name: str) -> Any:
    """An operator, whose module is loaded by the first use."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'fd_dsa.ops' has no attribute {name!r}")
    module, attribute = _FUNCTIONS[name]
    return getattr(import_module(f"fd_dsa.ops.{module}"), attribute)
