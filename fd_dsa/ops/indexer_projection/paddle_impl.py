"""Projections of the indexer on a CPU: two products by Paddle."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._host import as_numpy, check_writable
from fd_dsa.ops._linear import linear


def project_indexer(
    hidden_states: Any,
    wk: Any,
    weights_proj: Any,
    out: tuple[Any, Any] | None = None,
    scratch: None = None,
) -> tuple[Any, Any]:
    """See `fd_dsa.ops.indexer_projection`."""
    for index, result in enumerate(out or ()):
        check_writable("project_indexer", f"out[{index}]", result)
    x = as_numpy(hidden_states)
    results = linear(x, wk), linear(x, weights_proj)
    if out is None:
        return results
    for target, result in zip(out, results, strict=True):
        np.copyto(as_numpy(target), result)
    return out
