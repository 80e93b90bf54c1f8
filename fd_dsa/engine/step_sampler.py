"""From a step's logits to a token for each of its requests, on the host or where the logits are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.logprobs import TokenScore, score_tokens
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampler import Sampler


class StepSampler:
    """Samples the rows of a step; parameters are given to a sampler when a request takes its slot.

    A runner whose logits are on a device may have `draws` (`DeviceDraws`); it serves the steps all
    of whose requests need only a token: no rule changes their logits, and none asks for
    log-probabilities.

    Args:
        runner: see LLMEngine.
        num_slots: rows of a step.
    """

    def __init__(self, runner: Any, num_slots: int) -> None:
        self._runner, self._sampler = runner, Sampler(num_slots)
        self._has_draws = getattr(runner, "draws", None) is not None
        # arrival number of the request whose parameters the samplers have in a slot
        self._taken_by = [-1] * num_slots

    def draw(
        self, sampling: Sequence[Request], logits_indices: npt.NDArray[np.int64]
    ) -> Callable[[], npt.NDArray[np.int64]] | None:
        """Queue the step and draw on the device; None, and nothing is done, where it cannot serve.

        Args:
            sampling: requests of the rows of `logits_indices`, in order.
            logits_indices: see RunnerProtocol.

        Returns:
            What waits for the tokens, see `Sampler.sample`.
        """
        if not self._has_draws or len(sampling) != len(logits_indices) or not sampling:
            return None
        if any(request.rules is not None or request.logprobs is not None for request in sampling):
            return None
        places = self._places(sampling)
        draw: Callable[[], npt.NDArray[np.int64]]
        draw = self._runner.execute_and_draw(logits_indices, *places)
        return draw

    def sample(
        self, sampling: Sequence[Request], logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], list[TokenScore | None]]:
        """Tokens of the requests, see `Sampler.sample`, and scores of those that ask for them."""
        tokens = self._sampler.sample(logits, *self._places(sampling))
        scores: list[TokenScore | None] = [None] * len(sampling)
        scored = [
            row
            for row, request in enumerate(sampling)
            if request.logprobs is not None and tokens[row] >= 0
        ]
        if scored:
            num_top = [sampling[row].params.logprobs or 0 for row in scored]
            sampled_scores = score_tokens(logits[scored], tokens[scored], num_top)
            for row, score in zip(scored, sampled_scores, strict=True):
                scores[row] = score
        return tokens, scores

    def draft(
        self, requests: Sequence[Request], logits: npt.NDArray[np.float32], depth: int
    ) -> npt.NDArray[np.int64]:
        """Tokens drawn as those `depth` tokens later will be; the rules are those of now.

        Returns:
            int64 [n]; negative where the logits or the rules leave none.
        """
        slots, positions = self._places(requests)
        return self._sampler.sample(logits, slots, positions + depth)

    def _places(
        self, sampling: Sequence[Request]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Slot of each request and position of its next token; new ones give their parameters."""
        slots, positions = [], []
        for request in sampling:
            slots.append(request.slot)
            positions.append(request.num_output_tokens)
            if self._taken_by[request.slot] != request.arrival:
                self._take(request)
        return np.array(slots), np.array(positions)

    def _take(self, request: Request) -> None:
        slot, params = request.slot, request.params
        self._taken_by[slot] = request.arrival
        self._sampler.set_slot(slot, params, request.seed, request.rules)
        if self._has_draws and request.rules is None:
            from fd_dsa.runner.device_draws import SlotParameters

            self._runner.draws.set_slot(
                slot,
                SlotParameters(
                    params.temperature,
                    params.min_p,
                    max(params.top_k, 0),
                    params.top_p,
                    request.seed,
                ),
            )
