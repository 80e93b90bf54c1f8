"""Recordings made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fd_dsa.accuracy.matrix.recording import NUM_CANDIDATES, Trace
from fd_dsa.accuracy.matrix.running import Recording

FACTS: dict[str, Any] = {
    "steps": 9,
    "preemptions": 1,
    "prefix_hits": 64,
    "prefix_queries": 128,
    "seconds": 1.0,
    "providers": {"all operators": "hand"},
}


def trace(
    token_ids: Sequence[int], *, gap: float = 1.0, shift: float = 0.0, text: str = ""
) -> Trace:
    """An answer whose tokens lead by `gap` over their successors.

    Args:
        shift: added to every logit; other logits have other checksums.
    """
    count = len(token_ids)
    ids = np.array(token_ids, np.int64)
    candidates = ids[:, None] + np.arange(NUM_CANDIDATES)
    logits = np.float32(10 + shift) - np.float32(gap) * np.arange(NUM_CANDIDATES, dtype=np.float32)
    checksums = np.full(count, 1 if shift == 0 else 2, np.uint32)
    return Trace(text, "stop", ids, candidates, np.tile(logits, (count, 1)), checksums)


def recording(
    mode: str, traces: dict[str, Trace], losses: Sequence[float] | None = None, **facts: Any
) -> Recording:
    """A mode's answers."""
    known = None if losses is None else np.array(losses, np.float64)
    return Recording(mode, traces, {**FACTS, **facts}, known)
