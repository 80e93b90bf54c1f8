"""Tokens of the demo model that lead so clearly that rounding in another order changes none."""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.engine.output import RequestOutput

MAX_TOKENS = 64
"""Tokens of each greedy continuation of `LEADING_PROMPTS`."""


class Lead(NamedTuple):
    """Lead by which a device's tokens are compared, and the number of tokens that have it.

    Attributes:
        least: lead in log-probability of a token that a device must choose, too.
        min_tokens: tokens of all continuations before the first without such a lead.
    """

    least: float
    min_tokens: int


# Rounding in another order changes a hundredth of the first lead. Where it changes a code of a
# cache in FP8, logits of a later step were seen to differ by 0.07.
LEADS = {"float32": Lead(0.01, 320), "fp8_ds_mla": Lead(0.1, 128)}


def num_clear(output: RequestOutput, kv_cache_dtype: str) -> int:
    """Return the tokens of an output before the first whose lead is not clear.

    Args:
        output: answer with the two likeliest tokens of each place.
    """
    assert output.logprobs is not None
    for place, token in enumerate(output.logprobs):
        (_, best), (_, second) = token.score.top[:2]
        if best - second <= LEADS[kv_cache_dtype].least:
            return place
    return len(output.token_ids)
