"""`ifeval` and `score`: what is asked, kept, scored and said, and how a run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.accuracy import run, scorer
from fd_dsa.accuracy.answers import read_run
from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.prompts import OFFICIAL, read_prompts
from fd_dsa.client.own_server import OwnServer
from fd_dsa.errors import BackendUnavailable
from tests.client.scripted import Reply, Scripted, asked, chat, scripted

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = read_prompts()
# for a process to start and to ask, on a machine that starves it
TIMEOUT_S = 180


def upper(body: dict[str, Any]) -> Reply:
    """An answer that follows some instructions, and depends on the question."""
    return chat(f'"{asked(body).upper()}"')


def answers_of(out: Path) -> dict[str, str]:
    """Key -> text of what a run has kept."""
    return {key: answer.text for key, answer in read_run(out / "answers.jsonl").answers.items()}


def scores_of(out: Path) -> Any:
    """The scores of a run."""
    return json.loads((out / "scores.json").read_text())


def error_line(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    """The one line of a command that fails."""
    assert main(arguments) == status
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fd_dsa: error: ")]
    assert len(lines) == 1 and error.splitlines()[-1] == lines[0], error
    return lines[0].removeprefix("fd_dsa: error: ")


@pytest.mark.slow
def test_the_prompts_are_asked_as_they_are_and_the_answers_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with scripted(
        upper, {"/server_info": (200, {}, {"version": "7", "max_model_len": 2048})}
    ) as server:
        flags = ["--base-url", server.base_url, "--out", str(out), "--subset", "20"]
        assert main(["ifeval", *flags]) == 0
    wanted = [PROMPTS[i * 541 // 20] for i in range(20)]
    assert sorted(map(asked, server.bodies)) == sorted(prompt.text for prompt in wanted)
    for body in server.bodies:
        assert [message["role"] for message in body["messages"]] == ["user"]
        assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 1280, 0)
    assert answers_of(out) == {p.key: f'"{p.text.upper()}"' for p in wanted}
    scores = scores_of(out)
    assert [entry["key"] for entry in scores["prompts"]] == [prompt.key for prompt in wanted]
    assert scores["settings"]["server"]["version"] == "7"
    strict = scores["metrics"]["Prompt-level-strict-accuracy"]
    assert 0 < strict["passed"] < strict["total"] == 20
    printed = capsys.readouterr().out
    assert "partial set: 20 prompts with" in printed
    assert "Prompt-level-strict-accuracy" in (out / "report.md").read_text()


def test_a_server_that_fails_on_the_way_costs_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = threading.Event()
    broken.set()
    lock = threading.Lock()
    given: list[str] = []

    def answer(body: dict[str, Any]) -> Reply:
        with lock:
            if broken.is_set() and len(given) >= 5:
                return 400, {}, {"error": {"message": "out of order"}}
            given.append(asked(body))
        return upper(body)

    with scripted(answer) as server:
        flags = ["--base-url", server.base_url, "--subset", "12", "--concurrency", "3"]
        command = ["ifeval", *flags, "--out", str(tmp_path)]
        line = error_line(capsys, command, status=1)
        assert "status 400: out of order; 5 of 12 answers are kept in" in line
        assert not (tmp_path / "scores.json").exists()
        kept = answers_of(tmp_path)
        assert len(kept) == 5
        broken.clear()
        assert main(command) == 0
        assert len(given) == len(set(given)) == 12
        assert kept.items() <= answers_of(tmp_path).items()
    assert len(scores_of(tmp_path)["prompts"]) == 12


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path) -> None:
    hold, held = threading.Event(), threading.Semaphore(0)
    first: set[str] = set()
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> Reply:
        with lock:
            if len(first) < 4:
                first.add(asked(body))
        if asked(body) not in first:
            held.release()
            hold.wait(TIMEOUT_S)
        return upper(body)

    with scripted(answer) as server:
        url = server.base_url.replace("//", "//user:secret@")
        flags = ["--base-url", url, "--subset", "9", "--answers-only"]
        command = [sys.executable, "-m", "fd_dsa.accuracy", "ifeval", *flags, "--out", "it's a run"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        try:
            for _ in range(5):
                assert held.acquire(timeout=TIMEOUT_S)
            wait_for_lines(tmp_path / "it's a run/answers.jsonl", 5)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=TIMEOUT_S)[1]
        finally:
            hold.set()
            process.kill()
        assert process.returncode == 130
        line = error.splitlines()[-1]
        assert line.startswith("fd_dsa: error: interrupted; 4 of 9 answers are kept in it's a run/")
        before = (tmp_path / "it's a run/answers.jsonl").read_bytes()
        assert b"secret" not in before
        assert {asked_text(entry) for entry in before.splitlines()[1:]} == first
        resume = shlex.split(line.partition("the same command asks the others: ")[2])
        server.bodies.clear()
        # without an active environment there may be no command named python
        subprocess.run(resume, cwd=tmp_path, env=environment, check=True, timeout=TIMEOUT_S)
    assert len(server.bodies) == 5
    after = (tmp_path / "it's a run/answers.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(answers_of(tmp_path / "it's a run")) == 9


def wait_for_lines(path: Path, count: int) -> None:
    """Return once a file has so many whole lines."""
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asked_text(line: bytes) -> str:
    """The question of a line of answers.jsonl."""
    return asked(json.loads(line))


@pytest.fixture(scope="module")
def server() -> Any:
    """A server that answers everything; a test that expects no request looks at its bodies."""
    with scripted(upper) as running:
        yield running


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model", "demos"], "--model: got 'demos'; the server at URL has demo"),
        (["--max-tokens", "2048"], "--max-tokens: got 2048; demo takes 2048 tokens, prompt and"),
        (["--prompts", "no/such"], "no/such: cannot be read (No such file or directory)"),
        (["--prompts", __file__], "test_ifeval.py:1: got "),
        (["--subset", "542"], "--subset: got 542; the file has 541 prompts"),
        (["--subset", "0"], "--subset: got '0'; must be a whole number from 1 on"),
        (["--concurrency", "0"], "--concurrency: got '0'; must be a whole number from 1 on"),
        (["--retries", "x"], "--retries: got 'x'; must be a whole number from 0 to 1000"),
        (["--timeout", "nan"], "--timeout: got 'nan'; must be a number from 0.001 on"),
        (["--temperature", "-1"], "--temperature: got '-1'; must be a number from 0 on"),
        (["--temp", "1"], "unknown flag --temp; did you mean --temperature?"),
        (["--serve"], "--serve: not allowed with argument --base-url"),
        (["--", "--device", "gpu"], "flags after --: they are for a server of our own"),
        (["--out", __file__], f"--out: {__file__} is a file; give a folder"),
    ],
)
def test_what_cannot_run_is_one_line_before_the_first_request(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    server: Scripted,
    flags: list[str],
    text: str,
) -> None:
    asked_before, out = len(server.bodies), tmp_path / "run"
    command = ["ifeval", "--base-url", server.base_url, "--max-tokens", "8", "--out", str(out)]
    line = error_line(capsys, [*command, *flags])
    assert text in line.replace(server.base_url, "URL")
    assert len(server.bodies) == asked_before
    assert not out.exists()


def test_missing_checkers_are_found_before_the_first_request(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    server: Scripted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(prompts: Any) -> dict[str, str]:
        raise BackendUnavailable("the cure")

    monkeypatch.setattr(scorer, "ready", absent)
    asked_before, out = len(server.bodies), tmp_path / "run"
    command = ["ifeval", "--base-url", server.base_url, "--max-tokens", "8", "--out", str(out)]
    assert error_line(capsys, command) == "the cure"
    assert len(server.bodies) == asked_before
    assert not out.exists()
    assert main([*command, "--subset", "3", "--answers-only"]) == 0
    assert len(answers_of(out)) == 3
    assert error_line(capsys, ["score", str(out)]) == "the cure"


def test_a_server_of_its_own_that_does_not_start_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/run"
    flags = ["--answers-only", "--subset", "1", "--out", str(out)]
    line = error_line(capsys, ["ifeval", *flags, "--serve", "no/such"])
    assert line.startswith("--serve: got 'no/such'")
    line = error_line(capsys, ["ifeval", *flags, "--", "--zzz"])
    assert line == "--serve: unknown flag --zzz; --help lists the flags"
    assert not (tmp_path / "new").exists()


def test_the_log_of_its_own_server_is_named_when_that_goes_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(lambda body: (400, {}, {"error": {"message": "gone"}})) as failing:

        @contextmanager
        def own_server(model: str | None, flags: Any, log: Path) -> Iterator[OwnServer]:
            yield OwnServer(failing.base_url, ("python", model or "", *flags), log, 0)

        monkeypatch.setattr(run, "own_server", own_server)
        flags = ["--answers-only", "--subset", "3", "--out", str(tmp_path)]
        line = error_line(capsys, ["ifeval", *flags, "--serve", "m", "--", "--a", "b"], status=1)
    assert f"status 400: gone (its log: {tmp_path}/server.log); 0 of 3 answers are kept" in line
    assert line.endswith(f"--out {tmp_path} --serve m -- --a b")
    settings = read_run(tmp_path / "answers.jsonl").settings
    # the port is another one in every run
    assert settings.base_url == "own"
    assert settings.server["command"] == ["python", "m", "--a", "b"]


def write_prompts(path: Path, numbers: range) -> None:
    """Some official prompts as a file of one's own, in another order."""
    lines = OFFICIAL.read_text("utf-8").splitlines()
    path.write_text("\n".join(lines[number] for number in reversed(numbers)), "utf-8")


def test_score_gives_what_the_run_gave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Scripted
) -> None:
    own, first, other = tmp_path / "own.jsonl", tmp_path / "run", tmp_path / "other"
    write_prompts(own, range(100, 110))
    flags = ["--base-url", server.base_url, "--max-tokens", "8", "--prompts", str(own)]
    assert main(["ifeval", *flags, "--out", str(first)]) == 0
    # answers hold all that scoring needs
    own.unlink()
    assert main(["score", str(first / "answers.jsonl"), "--out", str(other)]) == 0
    assert scores_of(other) == scores_of(first)
    capsys.readouterr()


def test_reasoning_is_kept_and_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def thinking(body: dict[str, Any]) -> Reply:
        return chat("<think>\nno, commas, here\n</think>\n\nfine")

    with scripted(thinking) as server:
        flags = ["--base-url", server.base_url, "--subset", "9", "--out", str(tmp_path)]
        assert main(["ifeval", *flags]) == 0
    assert set(answers_of(tmp_path).values()) == {"<think>\nno, commas, here\n</think>\n\nfine"}
    hashes = {entry["answer_sha256"] for entry in scores_of(tmp_path)["prompts"]}
    assert hashes == {hashlib.sha256(b"fine").hexdigest()}
    assert "9 answers hold </think>" in capsys.readouterr().out


def test_score_without_answers_and_of_another_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(lambda body: (400, {}, {})) as refusing:
        flags = ["--base-url", refusing.base_url, "--subset", "2", "--out", str(tmp_path)]
        error_line(capsys, ["ifeval", *flags], status=1)
    assert "has no answers to score" in error_line(capsys, ["score", str(tmp_path)])
    empty = tmp_path / "responses.jsonl"
    empty.write_text("\n")
    assert "holds no response; at least one is needed" in error_line(capsys, ["score", str(empty)])
    file = tmp_path / "answers.jsonl"
    file.write_text(file.read_text().replace('"task": "ifeval"', '"task": "retrieval"'))
    assert "holds a run of retrieval; score reads ifeval" in error_line(
        capsys, ["score", str(tmp_path)]
    )
