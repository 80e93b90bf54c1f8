"""Operators of a layer without the checks of their public forms: for layers of the engine.

A layer calls these with what it made itself, some of them seven times a step.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.ops.providers import serving


def write_caches(kv_a: Any, index_k: Any, *others: Any) -> None:
    """See `fd_dsa.ops.cache_write.write_caches`."""
    serving("cache_write", index_k if kv_a is None else kv_a)(kv_a, index_k, *others)


def prepare_indexer_query(q: Any, *others: Any, **options: Any) -> tuple[Any, Any]:
    """See `fd_dsa.ops.query.prepare_indexer_query`."""
    return serving("indexer_query", q)(q, *others, **options)  # type: ignore[no-any-return]


def prepare_mla_query(q_latent: Any, *others: Any) -> Any:
    """See `fd_dsa.ops.mla_query.prepare_mla_query`."""
    return serving("mla_query", q_latent)(q_latent, *others)


def project_indexer(hidden_states: Any, *others: Any) -> tuple[Any, Any]:
    """See `fd_dsa.ops.indexer_projection.project_indexer`."""
    return serving("indexer_projection", hidden_states)(hidden_states, *others)  # type: ignore[no-any-return]
