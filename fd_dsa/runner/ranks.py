"""A model that several ranks run: rank 0 sends each step to the others, which run it too.

All of a step is decided before it is sent, so every rank makes the same calls in the same order,
and each meets the others in its model's collectives.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import paddle

from fd_dsa.runner.input_batch import Draw
from fd_dsa.runner.model_runner import ModelRunner
from fd_dsa.runner.protocol import RunnerInfo


class LeadingRunner(ModelRunner):
    """The runner of rank 0. Until `lead`, every rank makes the same calls by itself.

    Attributes:
        ranks: the others; None until `lead`.
    """

    ranks: Any = None

    @property
    def info(self) -> RunnerInfo:
        """See ModelRunner."""
        return replace(super().info, ranks=self.ranks)

    def lead(self, ranks: Any) -> None:
        """From now on send every step to the other ranks.

        Args:
            ranks: has `step`, which sends a message, unless it is None, and which is entered while
                this rank does what it says; it raises RankError where a rank has ended.
        """
        self.ranks = ranks
        if self.draws is not None:
            set_own_slot = self.draws.set_slot

            def set_slot(*arguments: Any) -> None:
                with self._sent("set_slot", *arguments, has_step=False):
                    set_own_slot(*arguments)

            self.draws.set_slot = set_slot  # type: ignore[method-assign]

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """See ModelRunner."""
        with self._sent("run", logits_indices):
            return super().execute_model(logits_indices)

    def queue_model(self, logits_indices: np.ndarray, draw: Draw) -> None:
        """See ModelRunner."""
        with self._sent("queue_model", logits_indices, draw):
            super().queue_model(logits_indices, draw)

    def draw(self, masks: Sequence[np.ndarray] = ()) -> Callable[[], np.ndarray]:
        """See ModelRunner."""
        with self._sent("draw", masks, has_step=False):
            draw = super().draw(masks)
        if self.ranks is None:
            return draw

        def taken() -> np.ndarray:
            with self.ranks.step(None):
                return draw()

        return taken

    @contextmanager
    def _sent(self, name: str, *arguments: Any, has_step: bool = True) -> Iterator[None]:
        """Have the others call a method of theirs, with the step that the batch holds."""
        if self.ranks is None:
            yield
            return
        state = self.input_batch.state() if has_step else None
        with self.ranks.step(pickle.dumps((name, arguments, state), pickle.HIGHEST_PROTOCOL)):
            yield


class FollowingRunner(ModelRunner):
    """The runner of any other rank."""

    def follow(self, receive: Callable[[], bytes]) -> None:
        """Run what rank 0 runs, until an error ends it.

        Args:
            receive: waits for the next message of a LeadingRunner.
        """
        while True:
            name, arguments, state = pickle.loads(receive())
            if state is not None:
                self.input_batch.restore(state)
            getattr(self, name)(*arguments)

    def run(self, logits_indices: np.ndarray) -> None:
        """Queue the step in the batch; nobody here needs its logits."""
        with paddle.no_grad():
            self.compute_logits(logits_indices)

    def set_slot(self, *arguments: Any) -> None:
        """See DeviceDraws."""
        assert self.draws is not None
        self.draws.set_slot(*arguments)
