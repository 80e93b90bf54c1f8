"""A proposer without a model (`spec_decode/ngram.py`); what it proposes is the caller's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdeploy._arrays import host, writable


class NgramProposer:
    """Drafts for rows that go on decoding.

    Attributes:
        propose: drafts that follow the accepted tokens of a row, at most `num_draft_tokens`.
    """

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.propose: Callable[[int, list[int]], list[int]] = lambda row, tokens: (
            [0] * num_draft_tokens
        )

    def run(self, share_inputs: Any, accepted: dict[int, list[int]]) -> None:
        """Write each row's last token and its drafts; a row that goes on has them all next."""
        now = host(share_inputs["seq_lens_this_time"]).reshape(-1).copy()
        for row, tokens in accepted.items():
            if not tokens:
                # the row ended in the step before
                continue
            drafts = self.propose(row, tokens)[: self.num_draft_tokens]
            with writable(share_inputs["draft_tokens"]) as rows:
                rows[row] = -1
                rows[row, : 1 + len(drafts)] = [tokens[-1], *drafts]
            if now[row]:
                with writable(share_inputs["seq_lens_this_time_buffer"]) as lengths:
                    lengths.reshape(-1)[row] = 1 + len(drafts)
