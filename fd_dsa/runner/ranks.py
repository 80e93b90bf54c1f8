"""Runners of a model that is split over several ranks.

Rank 0 decides on a step and sends it to the other ranks. Every rank makes the same calls in the
same order, so the ranks meet in the collectives of the model.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import paddle

from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.runner.input_batch import SamplingInputs
from fd_dsa.runner.model_runner import ModelRunner
from fd_dsa.runner.protocol import OtherRanks, RunnerInfo, StepFuture
from fd_dsa.runner.rank_blocks import SentBlockStore, make_calls


class DriverRunner(ModelRunner):
    """Runner of rank 0. Until `lead`, every rank makes the same calls by itself.

    Attributes:
        ranks: the other ranks; None until `lead`.
    """

    ranks: OtherRanks | None = None
    _sent_store: SentBlockStore | None = None

    @property
    def info(self) -> RunnerInfo:
        """See ModelRunner."""
        return replace(super().info, ranks=self.ranks)

    def lead(self, ranks: OtherRanks) -> None:
        """Send every later step to the other ranks, and the copies of blocks before it."""
        self.ranks = ranks
        if self.block_store is not None:
            self.block_store = self._sent_store = SentBlockStore(self.block_store)
        self.input_batch.begin_changes()

    def set_parameters(
        self,
        batch_row: int,
        parameters: RowParameters,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """See ModelRunner."""
        given = batch_row, parameters, prompt_token_ids, output_token_ids
        with self._sent("set_parameters", *given, has_step=False):
            super().set_parameters(*given)

    def copy_state(self, source: int, target: int) -> None:
        """See ModelRunner."""
        with self._sent("copy_state", source, target, has_step=False):
            super().copy_state(source, target)

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """See ModelRunner."""
        with self._sent("run", logits_indices):
            return super().execute_model(logits_indices)

    def enqueue_model(self, logits_indices: np.ndarray, sampling: SamplingInputs) -> None:
        """See ModelRunner."""
        with self._sent("enqueue_model", logits_indices, sampling):
            super().enqueue_model(logits_indices, sampling)

    def sample(self, masks: Sequence[np.ndarray] = ()) -> StepFuture:
        """See ModelRunner."""
        with self._sent("sample", masks, has_step=False):
            return self._watched(super().sample(masks))

    def read_drafts(self) -> StepFuture:
        """See ModelRunner. The other ranks do not read their drafts, which are the same."""
        return self._watched(super().read_drafts())

    def predict_more(
        self, next_ids: np.ndarray, tokens: Sequence[int], follows: Sequence[int] = ()
    ) -> np.ndarray:
        """See ModelRunner."""
        with self._sent("predict_more", next_ids, tokens, follows, has_step=len(follows) > 0):
            return super().predict_more(next_ids, tokens, follows)

    def seed_drafts(self, next_ids: np.ndarray, places: Sequence[Sequence[int]]) -> None:
        """See ModelRunner."""
        with self._sent("seed_drafts", next_ids, places, has_step=False):
            super().seed_drafts(next_ids, places)

    def draft(self, num_requests: int, count: int) -> None:
        """See ModelRunner."""
        with self._sent("draft", num_requests, count, has_step=False):
            super().draft(num_requests, count)

    def _watched(self, future: StepFuture) -> StepFuture:
        """Return a handle whose wait fails if another rank has ended."""
        return future if self.ranks is None else AllRanksFuture(future, self.ranks)

    @contextmanager
    def _sent(self, name: str, *arguments: object, has_step: bool = True) -> Iterator[None]:
        """Make the other ranks call their method `name`, with the step in the batch."""
        if self.ranks is None:
            yield
            return
        state = self.input_batch.state() if has_step else None
        store = self._sent_store if has_step else None
        message = name, arguments, state, store.calls if store else ()
        with self.ranks.step(pickle.dumps(message, pickle.HIGHEST_PROTOCOL)):
            if has_step:
                # not before, because a message that is not sent leaves its changes for the next one
                self.input_batch.begin_changes()
            if store is not None:
                store.run()
            yield


class AllRanksFuture:
    """StepFuture of a step that all ranks run.

    Args:
        future: handle of this rank.
        ranks: see `DriverRunner.lead`.
    """

    def __init__(self, future: StepFuture, ranks: OtherRanks) -> None:
        self._future, self._ranks = future, ranks

    def result(self) -> np.ndarray:
        """Wait for the tokens, as `StepFuture.result` does.

        Raises:
            RankError: another rank has ended.
        """
        with self._ranks.step(None):
            return self._future.result()


class WorkerRunner(ModelRunner):
    """Runner of any rank but 0."""

    def serve(self, receive: Callable[[], bytes]) -> None:
        """Make the calls of rank 0, until an error ends the loop.

        Args:
            receive: waits for the next message of a DriverRunner.
        """
        calls: dict[str, Callable[..., object]] = {
            "run": self.run,
            "enqueue_model": self.enqueue_model,
            "sample": self.sample,
            "set_parameters": self.set_parameters,
            "copy_state": self.copy_state,
            "predict_more": self.predict_more,
            "seed_drafts": self.seed_drafts,
            "draft": self.draft,
        }
        while True:
            name, arguments, state, copies = pickle.loads(receive())
            if state is not None:
                self.input_batch.restore(state)
            if self.block_store is not None:
                make_calls(self.block_store, copies)
            calls[name](*arguments)

    def run(self, logits_indices: np.ndarray) -> None:
        """Enqueue the step in the batch. This rank does not read its logits."""
        with paddle.no_grad():
            self.compute_logits(logits_indices)
