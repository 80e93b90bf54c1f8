"""Queries of MLA on a CPU, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._host import as_numpy, check_writable
from fd_dsa.ops._rope import cos_sin_of, rotate_


def prepare_mla_query(
    q_latent: Any, q_pe: Any, position_ids: Any, cos_sin_cache: Any, out: Any = None
) -> Any:
    """See `fd_dsa.ops.mla_query.prepare_mla_query`."""
    name = "prepare_mla_query"
    if out is not None:
        check_writable(name, "out", out)
    cos_sin = cos_sin_of(name, position_ids, cos_sin_cache)
    parts = as_numpy(q_latent), as_numpy(q_pe)
    query = np.concatenate(parts, axis=-1, out=None if out is None else as_numpy(out))
    rotate_(query[..., parts[0].shape[-1] :], cos_sin, interleaved=True)
    return query if out is None else out
