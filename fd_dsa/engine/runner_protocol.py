"""What the engine asks of a runner, and of the input batch that it fills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.scheduler import BlockTables


class StepRows(BlockTables, Protocol):
    """The input batch of a runner: what the engine writes before a step."""

    num_tokens: int
    num_prefill_tokens: int

    def begin_step(self) -> None:
        """Make every row idle; block tables stay."""

    def add_row(
        self, row: int, token_ids: Sequence[int], num_computed_tokens: int, is_prefill: bool
    ) -> int:
        """Flat index of the row's last token; rows come in ascending order."""

    def add_decode_rows(
        self, rows: Sequence[int], token_ids: Sequence[int], num_computed_tokens: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        """Flat indices of the tokens of rows that decode one each, in ascending order."""


class RunnerProtocol(Protocol):
    """What the engine asks of a runner."""

    input_batch: Any  # a StepRows; Any lets a runner declare its own class
    vocab_size: int

    def execute_model(self, logits_indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits float32 [n, vocab_size] of n flat token rows of the step just assembled."""
