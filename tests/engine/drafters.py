"""Drafters that know the answer, or do not."""

from __future__ import annotations

import random
from collections.abc import Mapping

from fd_dsa.engine.batch import Drafts
from fd_dsa.engine.request import Request


class KnowingDrafter:
    """Knows what follows, and says it in a share of the cases; other tokens in the rest.

    Args:
        answers: tokens of each output by request and index.
        right_share: of the drafts.
        vocab_size: of the wrong ones.
        seed: of the wrong ones.
        is_layer: whether it poses as a layer of the model.
    """

    prior_acceptance_rate = 0.7

    def __init__(
        self,
        answers: Mapping[tuple[str, int], list[int]],
        right_share: float,
        vocab_size: int,
        seed: int = 0,
        is_layer: bool = False,
    ) -> None:
        self._answers, self._share, self._vocab_size = answers, right_share, vocab_size
        self._draw = random.Random(seed)
        self.is_layer = is_layer

    def answer(self, request: Request) -> list[int]:
        """Return the tokens that the request will get."""
        return self._answers[request.state.request_id, request.state.index]

    def num_taken(self, request: Request) -> int:
        """Tokens of the output so far."""
        return len(request.output_token_ids)

    def propose(self, step: object, counts: Mapping[Request, int]) -> dict[Request, Drafts]:
        proposals = {}
        for request, count in counts.items():
            following = self.answer(request)[self.num_taken(request) :][:count]
            tokens = [
                token
                if self._draw.random() < self._share
                else self._draw.randrange(self._vocab_size)
                for token in following
            ]
            proposals[request] = Drafts(tokens)
        return proposals
