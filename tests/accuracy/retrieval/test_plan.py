"""Lengths as flags give them."""

from __future__ import annotations

import pytest

from fd_dsa.accuracy.retrieval.plan import Limits, default_lengths, parse_lengths
from fd_dsa.errors import ConfigError

DEMO, UNKNOWN = Limits(256, 8192, 64), Limits(None, None, 64)


def test_default_lengths_double_up_to_the_longest_prompt() -> None:
    assert default_lengths(DEMO) == (128, 256, 512, 1024, 2048, 4096, 8128)
    large = Limits(2048, 65536, 64)
    assert default_lengths(large) == (1024, 2048, 4096, 8192, 16384, 32768, 65472)
    assert default_lengths(Limits(None, 1601, 1)) == (50, 100, 200, 400, 800, 1600)


def test_lengths_may_be_said_in_words() -> None:
    text = "topk, topk+1,2*topk, max-10,100,max"
    assert parse_lengths(text, DEMO) == (100, 256, 257, 512, 8118, 8128)
    assert parse_lengths("5000,700", UNKNOWN) == (700, 5000)
    refused = {
        "8129": r"--lengths: got 8129; .* 64 .* 8192 allow 8128",
        "40*topk": "got 10240",
        "0": "--lengths: got 0; must be above 0",
        "1k": "--lengths: got '1k'",
        "topk2": "--lengths: got 'topk2'",
        "100,,200": "--lengths: got ''",
    }
    for text, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            parse_lengths(text, DEMO)
    for text, message in (("topk", "--index-topk: unknown"), ("max", "--lengths: not given")):
        with pytest.raises(ConfigError, match=message):
            parse_lengths(text, UNKNOWN)
