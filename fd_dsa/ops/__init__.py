"""Operators of DeepSeek Sparse Attention on Paddle tensors, on a CPU or a GPU.

The functions of `__all__` check their arguments and call a provider, which
`fd_dsa.ops.providers` selects. A function's module is imported when the function is first used,
so that an import of this package works without Paddle. The page is docs/operators.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module, name in the module
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
    """Return an operator and import its module on first use."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'fd_dsa.ops' has no attribute {name!r}")
    module, attribute = _FUNCTIONS[name]
    return getattr(import_module(f"fd_dsa.ops.{module}"), attribute)
