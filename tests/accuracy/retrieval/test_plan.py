"""Lengths, depths, tasks and wordings as flags give them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.accuracy.retrieval.plan import (
    Limits,
    continuity_lengths,
    default_lengths,
    parse_depths,
    parse_lengths,
    parse_tasks,
)
from fd_dsa.accuracy.retrieval.tasks import TaskSizes, check_sizes
from fd_dsa.accuracy.retrieval.wordings import ANNOUNCED, PLAIN, read_wording
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


@pytest.mark.parametrize(
    ("text", "limits", "message"),
    [
        ("8129", DEMO, r"--lengths: got 8129; .* 64 .* 8192 allow 8128"),
        ("40*topk", DEMO, "got 10240"),
        ("0", DEMO, "--lengths: got 0; must be above 0"),
        ("1k", DEMO, "--lengths: got '1k'"),
        ("topk2", DEMO, "--lengths: got 'topk2'"),
        ("100,,200", DEMO, "--lengths: got ''"),
        ("topk", UNKNOWN, "--index-topk: unknown"),
        ("max", UNKNOWN, "--lengths: not given"),
    ],
)
def test_lengths_that_cannot_be(text: str, limits: Limits, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_lengths(text, limits, 64)


def test_depths_and_tasks() -> None:
    assert parse_depths("1, 0,0.25,0") == (0.0, 0.25, 1.0)
    assert parse_tasks("variables,passkey") == ("passkey", "variables")
    for text in ("1.01", "-0.1", "half", "", "nan"):
        with pytest.raises(ConfigError, match="--depths: got"):
            parse_depths(text)
    with pytest.raises(ConfigError, match="unknown task 'niah'; allowed are passkey, multikey"):
        parse_tasks("passkey,niah")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (TaskSizes(keys=65), "--keys: got 65; allowed 1 to 64"),
        (TaskSizes(chains=0), "--chains: got 0"),
        (TaskSizes(hops=-1), "--hops: got -1"),
        (TaskSizes(chains=40, hops=3), "--chains: got 40; allowed 1 to 29"),
    ],
)
def test_sizes_without_enough_names_are_refused(sizes: TaskSizes, message: str) -> None:
    check_sizes(TaskSizes(), PLAIN)
    with pytest.raises(ConfigError, match=message):
        check_sizes(sizes, PLAIN)


def test_a_wording_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"passkey_needle": "Key: {value}!", "digits": 7, "keys": ["a b"]}))
    wording = read_wording(str(file))
    assert wording.passkey_needle.format(value=12) == "Key: 12!"
    assert (wording.name, wording.digits, wording.keys) == ("own", 7, ("a b",))
    assert wording.multikey_needle == PLAIN.multikey_needle
    file.write_text(json.dumps(asdict(ANNOUNCED)))
    assert read_wording(str(file)) == ANNOUNCED == read_wording("announced")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no valid JSON"),
        ([], "holds a list, not an object"),
        ({"needle": "x"}, "unknown field 'needle'"),
        ({"digits": "5"}, "digits: got '5'; must be of type int"),
        ({"digits": 40}, "digits: got 40; allowed 4 to 12"),
        ({"keys": ["a", "a"]}, "keys: 2 entries"),
        ({"keys": "abc"}, "keys: got 'abc'"),
        ({"passkey_needle": "Here it is."}, r"passkey_needle: .* needs \{value\}"),
        ({"passkey_needle": "{value} {key}"}, r"passkey_needle: .* needs \{value\}"),
        ({"passkey_needle": "{value"}, "passkey_needle: expected '}'"),
        ({"passkey_question": "What is {value}?"}, "passkey_question: .* needs none"),
        ({"letters": 1, "number_names": False}, "letters: got 1"),
    ],
)
def test_a_wording_that_cannot_be(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "own.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=f"^--wording: .*{message}"):
        read_wording(str(file))


def test_a_wording_that_is_nowhere() -> None:
    with pytest.raises(ConfigError, match="--wording: 'rulers' is neither plain nor announced"):
        read_wording("rulers")
