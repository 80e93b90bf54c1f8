"""The file of a run: nothing that came is lost, and two runs never mix."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.accuracy.answers import MAX_RUN_BYTES, open_store, read_run
from fd_dsa.accuracy.scores import RunSettings
from fd_dsa.client.questions import Answer, Question
from fd_dsa.errors import ConfigError
from tests.accuracy import scored

SETTINGS = replace(
    scored.SETTINGS,
    server={"version": "0.1.0", "commit": None},
    task_settings={"prompts_sha256": "ab"},
)
QUESTIONS = [
    Question(key, ({"role": "user", "content": f"say {key} ü\n"},), 8, {"n": key}) for key in "abc"
]


def answer(key: str, text: str = "yes", error: str | None = None) -> Answer:
    """An answer, or a failure."""
    return Answer(key, text, None if error else "stop", 3, 1, 0.5, error)


def write(path: Path, *answers: Answer, settings: RunSettings = SETTINGS) -> None:
    """A run with these answers."""
    by_key = {question.key: question for question in QUESTIONS}
    with open_store(path, settings) as store:
        for one in answers:
            store.add(by_key[one.key], one)


def test_what_was_added_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/answers.jsonl"
    odd = "a\nb\u2028c 🙂 \x00"
    write(path, answer("b", odd), answer("a"))
    run = read_run(path)
    assert run.settings == SETTINGS
    assert list(run.answers.values()) == [answer("b", odd), answer("a")]
    assert run.answers["b"].messages == QUESTIONS[1].messages
    assert run.answers["b"].metadata == {"n": "b"}
    assert len(path.read_bytes().splitlines()) == 3


def test_a_resumed_run_asks_what_is_missing_and_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, answer("a"), answer("b", "", error="status 500: oops"))
    assert list(read_run(path).failures) == ["b"]
    with open_store(path, SETTINGS) as store:
        assert [q.key for q in store.missing(QUESTIONS)] == ["b", "c"]
        store.add(QUESTIONS[1], answer("b", "now"))
        assert [q.key for q in store.missing(QUESTIONS)] == ["c"]
    run = read_run(path)
    assert run.answers == {"a": answer("a"), "b": answer("b", "now")}
    assert run.failures == {}


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, answer("a"), answer("b", "x" * 300))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert list(read_run(path).answers) == ["a"]
    write(path, answer("b", "x" * 300))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 30, 60])
def test_a_torn_first_line_is_a_new_run(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "answers.jsonl"
    write(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match="holds no settings and no answers"):
        read_run(path)
    write(path, answer("a"))
    assert list(read_run(path).answers) == ["a"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "other"}, "with model 'demo_model', this one has 'other'"),
        ({"max_tokens": 9}, "with max_tokens 1280, this one has 9"),
        ({"temperature": 0.5}, "with temperature 0.0, this one has 0.5"),
        ({"thinking": False}, "with thinking None, this one has False"),
        ({"base_url": "own"}, "with base_url 'http://127.0.0.1:8000/v1', this one has 'own'"),
        ({"server": {"version": "0.2"}}, "with server.version '0.1.0', this one has '0.2'"),
        (
            {"task_settings": {}},
            "with task_settings.prompts_sha256 'ab', this one has None",
        ),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, answer("a"))
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught, open_store(path, replace(SETTINGS, **change)):
        pass
    assert text in str(caught.value)
    assert "give another folder, or the same settings" in str(caught.value)
    assert path.read_bytes() == before


def test_what_a_server_does_not_tell_is_no_difference() -> None:
    now = replace(SETTINGS, server={"commit": "0123", "device": "cpu"})
    assert SETTINGS.differences(now) == now.differences(SETTINGS) == {}


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    refused = pytest.raises(ConfigError, match="another process writes to")
    with open_store(path, SETTINGS), refused:
        write(path, answer("a"))
    write(path, answer("a"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"role": "user"}\n', "line 1: format: got "),
        (b'{"role": "user"}', "is not the file of a run"),
        (b"\x00\xff\n", "line 1: got .*Invalid JSON"),
        (b'{"format": "fd_dsa answers 9", "settings": {}}\n', "should be 'fd_dsa answers 1'"),
    ],
)
def test_files_of_something_else_are_left_alone(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=text), open_store(path, SETTINGS):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line", ["{}", '{"key": 1}', "[]", "1", '{"key": "c", "text": 1', '{"key": "c"}']
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, answer("a"), answer("b"))
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(ConfigError, match=r"answers\.jsonl: line 3: .*repair or remove"):
        read_run(path)


def test_a_file_beyond_the_bound_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, answer("a"))
    os.truncate(path, MAX_RUN_BYTES + 1)
    rule = rf"answers\.jsonl: has more bytes, allowed: at most {MAX_RUN_BYTES}"
    with pytest.raises(ConfigError, match=rule):
        read_run(path)
    with pytest.raises(ConfigError, match=f"{rule}; give another folder"):
        write(path, answer("b"))
    assert path.stat().st_size == MAX_RUN_BYTES + 1


def test_a_missing_file_and_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory; give the answers"):
        read_run(tmp_path / "answers.jsonl")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out: .*cannot be written"):
        write(tmp_path / "file/answers.jsonl")
