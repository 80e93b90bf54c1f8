"""The official prompts are what they were, and a file that is no prompt file says where and why."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from fd_dsa.accuracy.prompts import OFFICIAL, arguments, read_prompts, set_warning
from fd_dsa.errors import ConfigError
from tests.accuracy import gpt4

GOOD: dict[str, Any] = {
    "key": 7,
    "prompt": "Say hello.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "at least", "num_words": 3}],
}


def _file(folder: Path, *lines: Any) -> Path:
    """A file with these lines; what is no bytes becomes JSON."""
    path = folder / "prompts.jsonl"
    written = [line if isinstance(line, bytes) else orjson.dumps(line) for line in lines]
    path.write_bytes(b"\n".join([*written, b""]))
    return path


@pytest.mark.parametrize("file", [OFFICIAL, gpt4.FILE], ids=["prompts", "answers"])
def test_data_are_those_of_their_notice(file: Path) -> None:
    notice = file.with_suffix(".NOTICE").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in notice
    assert "Apache License 2.0" in notice


def test_official_set() -> None:
    prompts = read_prompts()
    assert len(prompts) == len({prompt.key for prompt in prompts}) == 541
    assert sum(len(prompt.instruction_ids) for prompt in prompts) == 834
    # what one prompt gives to an instruction, all others give too
    given = {
        (name, frozenset((key, type(value)) for key, value in kwargs.items()))
        for prompt in prompts
        for name, kwargs in zip(prompt.instruction_ids, prompt.kwargs, strict=True)
    }
    assert given == {(name, frozenset(kinds.items())) for name, kinds in arguments().items()}
    assert len(arguments()) == 25
    assert set_warning(prompts) is None
    assert set_warning(prompts[::-1]) is None


def test_part_of_the_set_is_said_to_be_partial(tmp_path: Path) -> None:
    text = str(set_warning(read_prompts()[:3]))
    assert text.startswith("partial set: 3 of 541 prompts, 5 of 834 instructions; comparable")
    own = read_prompts(_file(tmp_path, GOOD))
    assert str(set_warning(own)).startswith("not IFEval's official set: 1 prompts, 2 instructions")


def test_changed_official_prompt_is_not_official(tmp_path: Path) -> None:
    lines = OFFICIAL.read_bytes().splitlines()
    changed = orjson.loads(lines[5])
    changed["prompt"] += " Please."
    lines[5] = orjson.dumps(changed)
    assert "not IFEval's official set" in str(set_warning(read_prompts(_file(tmp_path, *lines))))


def test_null_arguments_count_as_left_out(tmp_path: Path) -> None:
    nulls = {"num_bullets": None, "relation": "at least", "num_words": 3, "letter": None}
    line = {**GOOD, "kwargs": [{"num_words": None}, nulls], "note": "ignored"}
    (prompt,) = read_prompts(_file(tmp_path, line, b"", b"  "))
    assert prompt.kwargs == ({}, {"relation": "at least", "num_words": 3})
    assert prompt.key == "7"


WORDS = "length_constraints:number_words"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"key": None}, "key: None; a whole number or a text is needed"),
        ({"key": True}, "key: True; a whole"),
        ({"prompt": " "}, "prompt: ' '; a text that is not empty is needed"),
        ({"prompt": 3}, "prompt: 3; a text"),
        ({"instruction_id_list": []}, r"instruction_id_list: \[\]; a list of at least one"),
        ({"instruction_id_list": None}, "instruction_id_list: None; a list of at least one"),
        (
            {"instruction_id_list": ["punctuation:no_comma", "punctuation:comma"]},
            "instruction_id_list: 'punctuation:comma'; allowed are change_case:capital_word_freq",
        ),
        ({"instruction_id_list": [["x"], WORDS]}, r"instruction_id_list: \['x'\]; allowed are"),
        ({"kwargs": [{}]}, "kwargs: 1 entries; one object for each instruction is needed"),
        ({"kwargs": None}, "kwargs: None; one object for each"),
        ({"kwargs": [{}, 3]}, f"kwargs of {WORDS}: 3; an object is needed"),
        ({"kwargs": [{"x": 1}, {}]}, "kwargs of punctuation:no_comma: 'x'; allowed are none"),
        ({"kwargs": [{}, {"num_words": 3}]}, f"kwargs of {WORDS}: relation is missing; 'at least'"),
        (
            {"kwargs": [{}, {"num_words": 0, "relation": "at least"}]},
            f"kwargs of {WORDS}: num_words: 0; a whole number of 1 or more",
        ),
        (
            {"kwargs": [{}, {"num_words": 9, "relation": "at most"}]},
            f"kwargs of {WORDS}: relation: 'at most'; 'at least' or 'less than'",
        ),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a", ""]}]},
            r"kwargs of keywords:existence: keywords: \['a', ''\]; a list of non-empty texts",
        ),
    ],
)
def test_bad_line_names_line_field_value_and_rule(
    change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = _file(tmp_path, {**GOOD, "key": 6}, {**GOOD, **change})
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}:2: {expected}") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", "not JSON (Expecting property name"),
        (b'{"key": "\xff"}', "not JSON ("),
        (b"[]", "[] is no JSON object; one JSON object a line"),
        (GOOD, "key: '7' is also the key of line 1; keys must be unique"),
        ({**GOOD, "key": "7"}, "key: '7' is also the key of line 1"),
    ],
)
def test_line_that_is_no_prompt(line: Any, expected: str, tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD, b"", line)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:3: {expected}")
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_or_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such.jsonl cannot be read .No such file"):
        read_prompts(tmp_path / "no such.jsonl")
    with pytest.raises(ConfigError, match=r"cannot be read .Is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(ConfigError, match="holds no prompt; at least one is needed"):
        read_prompts(_file(tmp_path))
