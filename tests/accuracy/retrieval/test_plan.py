"""Lengths, depths, tasks and sizes as flags give them."""

from __future__ import annotations

import pytest

from fd_dsa.accuracy.retrieval.plan import (
    Limits,
    continuity_lengths,
    default_lengths,
    parse_depths,
    parse_lengths,
    parse_tasks,
)
from fd_dsa.errors import ConfigError

DEMO, UNKNOWN = Limits(256, 8192), Limits(None, None)


def test_default_lengths_double_up_to_the_longest_prompt() -> None:
    assert default_lengths(DEMO, 64) == (128, 256, 512, 1024, 2048, 4096, 8128)
    assert default_lengths(Limits(2048, 65536), 64) == (1024, 2048, 4096, 8192, 16384, 32768, 65472)
    assert default_lengths(Limits(None, 1600), 0) == (50, 100, 200, 400, 800, 1600)


def test_continuity_begins_where_the_whole_answer_is_dense() -> None:
    lengths = continuity_lengths(DEMO, 64)
    assert lengths == (192, 254, 255, 256, 257, 258, 320, 512)
    assert lengths[0] + 64 <= 256


def test_lengths_may_be_said_in_words() -> None:
    text = "topk, topk+1,2*topk, max-10,100,max"
    assert parse_lengths(text, DEMO, 64) == (100, 256, 257, 512, 8118, 8128)
    assert parse_lengths("5000,700", UNKNOWN, 64) == (700, 5000)
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
            parse_lengths(text, DEMO, 64)
    for text, message in (("topk", "--index-topk: unknown"), ("max", "--lengths: not given")):
        with pytest.raises(ConfigError, match=message):
            parse_lengths(text, UNKNOWN, 64)


def test_depths_and_tasks() -> None:
    assert parse_depths("1, 0,0.25,0") == (0.0, 0.25, 1.0)
    assert parse_tasks("variables,passkey") == ("passkey", "variables")
    for text in ("1.01", "-0.1", "half", "", "nan"):
        with pytest.raises(ConfigError, match="--depths: got"):
            parse_depths(text)
    with pytest.raises(ConfigError, match="unknown task 'niah'; allowed are passkey, multikey"):
        parse_tasks("passkey,niah")
