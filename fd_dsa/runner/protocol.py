"""Interface between an engine and its runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import RankError
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.ops.sampling.token_buffer import TokenBuffer
from fd_dsa.runner.counters import StepCounters
from fd_dsa.runner.input_batch import InputBatch, SamplingInputs

Logits = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
StateCopy = Callable[[int, int], None]
"""Function that enqueues the copy of a state from one place to another. A row is its own place."""


class Runner(Protocol):
    """Runs the model on the step that an engine assembles in `input_batch`."""

    @property
    def input_batch(self) -> InputBatch:
        """Rows of the step, whose sizes bound a step."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    @property
    def info(self) -> RunnerInfo:
        """Optional parts of the runner, as they are now."""

    def execute_model(self, logits_indices: Indices) -> Logits:
        """Run the step and wait for its logits.

        Args:
            logits_indices: int64 [n]; flat tokens of the step whose logits are wanted, n may be 0.

        Returns:
            float32 [n, vocab_size]; valid until the next step.
        """


class StepFuture(Protocol):
    """Handle of tokens that the device has not sampled yet."""

    def result(self) -> Indices:
        """Wait for the tokens.

        Returns:
            int64 [n]; token ids, or result codes of `fd_dsa.ops.sampling.token_buffer`. Valid until
            the second step after this one is sampled.
        """


class SamplingRunner(Protocol):
    """Runner that samples on its device, so the host need not wait for the logits."""

    def set_parameters(
        self,
        batch_row: int,
        parameters: RowParameters,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Set how the tokens of a row are sampled from the next sampling on.

        Args:
            batch_row: row of the request in the input batch.
            parameters: parameters of the request in the row.
            prompt_token_ids, output_token_ids: known tokens, if the parameters penalize them.
        """

    def read_drafts(self) -> StepFuture:
        """Enqueue a copy of the token buffer, which holds the drafts."""

    def enqueue_model(self, logits_indices: Indices, sampling: SamplingInputs) -> None:
        """Enqueue the step without its sampling, which `sample` adds before the next step.

        Args:
            logits_indices: as for `execute_model`, at least one.
            sampling: how a token is sampled from each row of logits.
        """

    def sample(self, masks: Sequence[npt.NDArray[np.int32]] = ()) -> StepFuture:
        """Enqueue the sampling of the step that `enqueue_model` enqueued.

        Args:
            masks: allowed tokens of the masked rows, int32 [ceil(vocab_size / 32)] each.

        Returns:
            Handle of a token for each row of logits.
        """


class MtpRunner(Runner, Protocol):
    """Runner on a CPU whose model has a layer for multi-token prediction (MTP)."""

    def predict_more(
        self, next_ids: Indices, tokens: Sequence[int], follows: Sequence[int] = ()
    ) -> Logits:
        """Run the layer over the newest step.

        Args:
            next_ids: int64 [num_tokens]; the token after each token of the step.
            tokens: flat tokens whose logits are wanted, n may be 0.
            follows: empty = run the layer on the hidden states of the model. Otherwise run it over
                the step in the batch, on its own hidden states. Then `follows` has, for each token
                of the step, its index among `tokens` of the call before.

        Returns:
            float32 [n, vocab_size]; logits of the token after the next one.
        """


class DeviceMtpRunner(Runner, Protocol):
    """Runner whose layer for multi-token prediction (MTP) drafts on the device."""

    @property
    def token_buffer(self) -> TokenBuffer:
        """Layout of the buffer that holds the drafts."""

    def seed_drafts(self, next_ids: Indices, places: Sequence[Sequence[int]]) -> None:
        """Set the inputs of `draft` after a step that the host has sampled.

        Args:
            next_ids: int64 [num_tokens]; the token after each token of the step.
            places: for each request the flat token before its draft, its batch row, the position of
                the draft, and the number of tokens in the cache.
        """

    def draft(self, num_requests: int, count: int) -> None:
        """Enqueue the layer over the newest step, and its drafts.

        Args:
            num_requests: maximum number of requests that continue.
            count: number of drafts of each request. The layer makes the first one in any case.
        """


class SelectionRunner(Protocol):
    """Runner that can return the keys that the indexer selected."""

    def execute_with_selections(
        self, logits_indices: Indices, tokens: Sequence[int] | Indices
    ) -> tuple[Logits, list[list[Indices]]]:
        """Run the step as `execute_model` does, and collect selections.

        Args:
            logits_indices: as for `execute_model`.
            tokens: flat tokens whose selections are wanted.

        Returns:
            The logits; and for each token and layer the selected positions, ascending int64 [n].
        """


class BlockStore(Protocol):
    """Host memory for blocks of the caches, and copies in both directions.

    The order of calls before a step is `begin`, `copy` for each run of blocks, `end`, `precede`.
    Copies run in the order of their calls, and no two at a time.

    Attributes:
        num_slots: number of blocks that the memory holds, at least 1.
        overlaps: True if copies run while steps run; False if `copy` returns when it is done.
    """

    num_slots: int
    overlaps: bool

    @property
    def num_done(self) -> int:
        """Number of the last `end` whose copies are done."""

    def begin(self) -> None:
        """Make later copies wait for all steps that are enqueued."""

    def copy(self, loads: bool, block: int, slot: int, count: int) -> None:
        """Enqueue the copy of `count` neighbouring blocks.

        Args:
            loads: True = from host memory to the caches.
            block, slot: first block of the caches and of the host memory.
        """

    def end(self, number: int) -> None:
        """Number the copies so far. Numbers ascend."""

    def precede(self, number: int) -> None:
        """Make later steps wait for the copies up to a number. The host continues at once."""


class OtherRanks(Protocol):
    """Processes that run each step together with this one."""

    def on_failure(self, call: Callable[[RankError], object]) -> None:
        """Call a function with the error when a process fails."""

    def step(self, message: bytes | None) -> AbstractContextManager[None]:
        """Send a message to all processes, unless it is None.

        Inside the context, this process does its part of the step.

        Raises:
            RankError: a process has ended.
        """

    def close(self) -> None:
        """End the processes."""


@dataclass(frozen=True)
class RunnerInfo:
    """Optional parts of a runner.

    Attributes:
        sampling: samples on the device; None if only the host samples.
        selections: shows the indexer's selections; None if they stay in device memory.
        counters: counts of the steps that were run, or None.
        captured_sizes: rows of the decode steps that are replayed from graphs, ascending.
        ranks: processes that run each step too; None without any.
    """

    sampling: SamplingRunner | None = None
    selections: SelectionRunner | None = None
    counters: StepCounters | None = None
    captured_sizes: tuple[int, ...] = ()
    ranks: OtherRanks | None = None
