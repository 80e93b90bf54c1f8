"""Operators of a layer without the checks of their public forms: for layers of the engine.

A layer calls these with what it made itself, some of them seven times a step. Their arguments are
those of `write_caches`, `indexer_query` (on a CPU `q` is overwritten, and without `out` values are
returned instead of codes), `prepare_mla_query`, and of `fd_dsa.ops.indexer_projection`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fd_dsa.ops.providers import serving


def _unchecked(operator: str) -> Callable[..., Any]:
    """What serves an operator where its first tensor is."""

    def call(*arguments: Any, **options: Any) -> Any:
        tensor = arguments[0] if arguments[0] is not None else arguments[1]
        return serving(operator, tensor)(*arguments, **options)

    return call


write_caches = _unchecked("cache_write")
prepare_indexer_query = _unchecked("indexer_query")
prepare_mla_query = _unchecked("mla_query")
project_indexer = _unchecked("indexer_projection")
