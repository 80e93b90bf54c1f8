"""Losses of all tokens of a sequence, from the logits of the embedded engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle

from fd_dsa.accuracy.embedded import SingleSequenceRunner


def token_losses(sequence: SingleSequenceRunner, token_ids: Sequence[int]) -> np.ndarray:
    """Return float64 [n - 1]: -log p of every token but the first, given the ones before."""
    head = sequence.runner.model.compute_logits
    with paddle.no_grad():
        found = [head(hidden) for hidden in sequence.chunks(token_ids)]
    rows = [logits if isinstance(logits, np.ndarray) else logits.numpy() for logits in found]
    logits = np.concatenate(rows)[:-1].astype(np.float64)
    logits -= logits.max(axis=1)[:, None]
    chosen = logits[np.arange(len(logits)), token_ids[1:]]
    return np.log(np.exp(logits).sum(axis=1)) - chosen
