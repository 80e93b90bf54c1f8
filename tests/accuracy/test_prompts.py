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
    rules = [prompt.metadata for prompt in prompts]
    assert sum(len(rule["instruction_ids"]) for rule in rules) == 834
    # what one prompt gives to an instruction, all others give too
    given = {
        (name, frozenset((key, type(value)) for key, value in kwargs.items()))
        for rule in rules
        for name, kwargs in zip(rule["instruction_ids"], rule["kwargs"], strict=True)
    }
    assert given == {(name, frozenset(kinds.items())) for name, kinds in arguments().items()}
    assert len(arguments()) == 25
    assert set_warning(prompts) is None
    assert set_warning(prompts[::-1]) is None


def test_part_of_the_set_is_said_to_be_partial(tmp_path: Path) -> None:
    text = str(set_warning(read_prompts()[:3]))
    assert text.startswith("partial set: 3 prompts with 5 instructions, of 541 prompts with 834")
    own = read_prompts(_file(tmp_path, GOOD))
    assert str(set_warning(own)).startswith("not IFEval's official set: 1 prompts with 2 instr")


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
    assert prompt.metadata["kwargs"] == [{}, {"relation": "at least", "num_words": 3}]
    assert prompt.key == "7"


WORDS = "length_constraints:number_words"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"key": None}, "key: int: got None: Input should be a valid integer"),
        ({"key": True}, "key: int: got True: Input should be a valid integer"),
        ({"prompt": " "}, "prompt: got ' ': String should match pattern"),
        ({"prompt": 3}, "prompt: got 3: Input should be a valid string"),
        ({"instruction_id_list": None}, "instruction_id_list: got None: Input should be"),
        ({"instruction_id_list": [["x"], WORDS]}, r"instruction_id_list: 0: got \['x'\]: Input"),
        ({"instruction_id_list": [], "kwargs": []}, "kwargs: got 0 objects for 0 instructions"),
        ({"kwargs": [{}]}, "kwargs: got 1 objects for 2 instructions; one for each is needed"),
        ({"kwargs": None}, "kwargs: got None: Input should be a valid array"),
        ({"kwargs": [{}, 3]}, "kwargs: 1: got 3: Input should be an object"),
        (
            {"instruction_id_list": ["punctuation:no_comma", "punctuation:comma"]},
            "instruction_id_list: got 'punctuation:comma'; allowed are change_case:capital_word",
        ),
        (
            {"kwargs": [{"x": 1}, {}]},
            r"kwargs of punctuation:no_comma: got \{'x': 1\}; must be empty",
        ),
        *(
            (
                {"kwargs": [{}, {"num_words": number, "relation": "at least"}]},
                rf"kwargs of {WORDS}: got \{{.*\}}; must be relation \(str\), num_words \(int\)",
            )
            # the checkers would replace the first two by a random number
            for number in (None, -1, "3")
        ),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": []}]},
            r"kwargs of keywords:existence: got \{\}; must be keywords \(list\)",
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
        (b"{", "got b'{': Invalid JSON"),
        (b'{"key": "\xff"}', "got "),
        (b"[]", "got []: Input should be an object"),
        (GOOD, "key: got '7' twice; keys must be unique"),
        ({**GOOD, "key": "7"}, "key: got '7' twice; keys must be unique"),
    ],
)
def test_line_that_is_no_prompt(line: Any, expected: str, tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD, b"", line)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:3: {expected}")
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_or_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such.jsonl: cannot be read .No such file"):
        read_prompts(tmp_path / "no such.jsonl")
    with pytest.raises(ConfigError, match=r"cannot be read .Is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(ConfigError, match="holds no prompt; at least one is needed"):
        read_prompts(_file(tmp_path))
    # a device has no size
    with pytest.raises(ConfigError, match="/dev/zero: has more bytes, allowed: at most 200000000"):
        read_prompts("/dev/zero")
