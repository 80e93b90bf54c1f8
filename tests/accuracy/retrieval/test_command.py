"""The command against servers that read perfectly, forget, or count otherwise."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.retrieval.prompts import TokenCounter
from fd_dsa.accuracy.scores import read_scores
from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from tests.accuracy.retrieval.reader import read
from tests.client.scripted import Reply, Scripted, asked, scripted

INDEX_TOPK = 256
MODELS = {"/v1/models": (200, {}, {"data": [{"id": "reader", "max_model_len": 1200}]})}
FEW = ["--lengths", "300,600", "--depths", "0,1", "--trials", "1"]


@cache
def counter() -> TokenCounter:
    """The demo model's tokenizer."""
    return TokenCounter(Tokenizer.from_folder(demo_model_path()), "--tokenizer")


@contextmanager
def reading(
    answer: Callable[[str], str] = read, tokens: Callable[[int], int | None] = lambda n: n
) -> Iterator[Scripted]:
    """A server that answers prompts so, and counts their tokens so.

    Args:
        answer: of a prompt.
        tokens: what the server says of so many tokens.
    """

    def reply(body: dict[str, Any]) -> Reply:
        text = asked(body)
        choice = {"message": {"content": answer(text)}}
        count = tokens(counter().prompt(text))
        usage = {} if count is None else {"prompt_tokens": count, "completion_tokens": 1}
        return 200, {}, {"choices": [{**choice, "finish_reason": "stop"}], "usage": usage}

    with scripted(reply, MODELS) as server:
        yield server


def at(server: Scripted) -> list[str]:
    """Flags that name a server and its tokenizer."""
    return ["--base-url", server.base_url, "--tokenizer", str(demo_model_path())]


def run(server: Scripted, out: Path, *flags: str) -> Any:
    """A run that ends well, and its scores."""
    command = ["retrieval", *at(server), "--out", str(out), *flags]
    assert main(command) == 0
    return json.loads((out / "scores.json").read_text())


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that cannot begin."""
    assert main(["retrieval", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("fd_dsa: error: ")
    assert sum("error" in line for line in lines) == 1
    return lines[-1].removeprefix("fd_dsa: error: ")


def test_a_perfect_reader_passes_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("passkey", "multikey", "variables")
    with reading() as server:
        scores = run(server, tmp_path, *FEW, "--tasks", ",".join(tasks))
    cells = {
        (c["task"], c["length"], c["depth"]): (c["passed"], c["total"]) for c in scores["cells"]
    }
    places = itertools.product(tasks, (300, 600), (0.0, 1.0))
    assert cells == dict.fromkeys(places, (1, 1))
    printed = capsys.readouterr().out
    assert "The server counts the same lengths (12 prompts)." in printed
    page = (tmp_path / "report.md").read_text()
    for task in tasks:
        assert (
            "| 600 | 1/1 | 1/1 | 100.00 [" in page.partition(f"**{task}: passed / tried")[2][:250]
        )


def test_a_reader_of_the_end_alone_fails_at_the_other_depths(tmp_path: Path) -> None:
    def of_the_end(prompt: str) -> str:
        return read(prompt[-600:])

    with reading(of_the_end) as server:
        flags = ("--depths", "0,0.5,1", "--lengths", "600", "--trials", "2")
        scores = run(server, tmp_path, "--tasks", "passkey,variables", *flags)
    passed = {(c["task"], c["depth"]): c["passed"] for c in scores["cells"]}
    assert [passed["passkey", depth] for depth in (0, 0.5, 1)] == [0, 0, 2]
    # the end of a chain is there, its beginning is not
    assert passed["variables", 0.0] == 0


def test_an_answer_that_names_everything_does_not_pass(tmp_path: Path) -> None:
    with reading(lambda prompt: prompt) as server:
        scores = run(server, tmp_path, *FEW)
    passed = {(c["task"], c["passed"]) for c in scores["cells"]}
    assert passed == {("passkey", 1), ("multikey", 0), ("variables", 0)}
    assert all(all(p["follow_loose"]) for p in scores["prompts"])


def test_runs_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reading() as good, reading(lambda prompt: "") as bad:
        run(good, tmp_path / "a", *FEW)
        run(bad, tmp_path / "b", *FEW)
    assert len(read_scores(tmp_path / "a").prompts) == 12
    capsys.readouterr()
    flags = ["--allow", "base_url"]
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "12 got worse and 0 got better (p = 0.00049" in printed


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reading() as server:
        scores = run(server, tmp_path, *FEW)
        kept = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "answers.jsonl").write_bytes(b"".join(kept[:6]) + kept[6][:50])
        server.bodies.clear()
        assert run(server, tmp_path, *FEW) == scores
        asked_again = [text for body in server.bodies if "\n\n" in (text := asked(body))]
        assert len(asked_again) == 12 - 5
        line = error_line(capsys, *at(server), "--out", str(tmp_path), *FEW, "--depths", "1")
    assert "task_settings.depths" in line and "another folder" in line


def test_continuity_shows_a_collapse_past_index_topk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dense_only(prompt: str) -> str:
        return read(prompt) if counter().prompt(prompt) <= INDEX_TOPK else "I do not know."

    flags = ("--continuity", "--tasks", "passkey", "--lengths", "192,topk,topk+1", "--trials", "3")
    with reading(dense_only) as server:
        scores = run(server, tmp_path, *flags)
    worse = {length: change["worse"] for length, change in scores["continuity"].items()}
    assert worse == {"192": 0, "256": 0, "257": 9}
    assert "A step at 257 tokens (index_topk 256): 9 of 9" in capsys.readouterr().out


def test_the_defaults_reach_the_longest_prompt_that_the_server_takes(tmp_path: Path) -> None:
    with reading() as server:
        scores = run(server, tmp_path, "--tasks", "passkey", "--depths", "0.5", "--trials", "1")
    # 1,200 in all, 64 of them for the answer
    assert [c["length"] for c in scores["cells"]] == [128, 256, 512, 1136]


def test_another_template_and_another_tokenizer_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reading(tokens=lambda n: n + 7) as server:
        run(server, tmp_path / "a", *FEW, "--tasks", "passkey")
    assert "the server counts +7 to +7 tokens" in capsys.readouterr().out
    with reading(tokens=lambda n: 2 * n) as server:
        run(server, tmp_path / "b", *FEW, "--tasks", "passkey")
    assert "the server counts +300 to +600 tokens" in capsys.readouterr().out
    with reading(tokens=lambda n: None) as server:
        run(server, tmp_path / "c", *FEW, "--tasks", "passkey")
    assert "reports no prompt tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "niah"), "--tasks: got 'niah'; must be of passkey, multikey"),
        (("--depths", "0,1.5"), "--depths: got '0,1.5'; must be numbers from 0"),
        (("--lengths", "9000000"), "--lengths: got 9000000"),
        (("--lengths", "30"), "--lengths: got 30; the question and what is hidden take"),
        (("--trials", "0"), "--trials: got '0'; must be a whole number from 1 on"),
        (("--trials", "many"), "--trials: got 'many'"),
        (("--trials", "20000"), "--trials, --lengths and --depths: "),
        (("--index-topk", "-3"), "--index-topk: got '-3'"),
        (("--tokenizer", "/nowhere"), "--tokenizer: got '/nowhere', allowed: an existing folder"),
        (("--tokenizer", ""), "--tokenizer: got '', allowed: an existing folder"),
        (("--base-url", "http://127.0.0.1:9/v1"), "--tokenizer: not given with --base-url; give"),
    ],
)
def test_bad_input_is_told_before_a_server_is_started(
    flags: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr("fd_dsa.accuracy.run.own_server", started)
    out = tmp_path / "run"
    assert error_line(capsys, "--out", str(out), *flags).startswith(message)
    assert not out.exists()


def test_a_length_that_only_the_server_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reading() as server:
        flags = (*at(server), "--lengths", "1137", "--out", str(tmp_path / "x"))
        line = error_line(capsys, *flags)
        assert not server.bodies
    assert line.startswith("--lengths: got 1137; with 64 tokens for the answer the model's 1200")
    assert not (tmp_path / "x").exists()


def test_damaged_tokenizer_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_bytes((demo_model_path() / "tokenizer.json").read_bytes())
    for text, message in (
        ("{", "config.json: cannot be read as JSON"),
        ('{"index_topk": "64"}', "index_topk: got '64'"),
    ):
        (tmp_path / "config.json").write_text(text)
        assert message in error_line(capsys, "--tokenizer", str(tmp_path))
