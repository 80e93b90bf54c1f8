"""A step of which some requests want to see what the indexer chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.output import TopkPositions
from fd_dsa.engine.request import Request


def execute(
    runner: Any, sampling: Sequence[Request], logits_indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Run the step; requests that ask for it are given what was chosen for their newest token.

    Args:
        runner: a RunnerProtocol; where requests ask, one that `shows_selections`.
        sampling: requests of the first rows of `logits_indices`.
        logits_indices: see RunnerProtocol.
    """
    rows = [row for row, request in enumerate(sampling) if request.params.return_topk_positions]
    if not rows:
        return runner.execute_model(logits_indices)
    logits, chosen = runner.execute_watched(logits_indices, logits_indices[rows])
    for row, layers in zip(rows, chosen, strict=True):
        request = sampling[row]
        request.topk_positions = TopkPositions(len(request.token_ids) - 1, layers)
    return logits
