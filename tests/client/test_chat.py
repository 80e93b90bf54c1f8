"""`fd-dsa chat` in a process, with servers that run and with one that it starts."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fd_dsa.chat.deepseek_encoding import DeepseekV32Encoding
from fd_dsa.chat.events import Event
from fd_dsa.cli import main
from fd_dsa.client.chat import ChatSession, Conversation
from tests.client.scripted import aborted, scripted
from tests.serve.conftest import Live, running, wait_until
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.processes import console, environment, run_console

ANSWER = "".join(WORDS)
Pipe = Callable[..., tuple[int, str, str]]


def prompts(live: Live) -> list[str]:
    """Texts of the prompts so far."""
    return [bytes(prompt).decode() for prompt, _ in live.engine.requests.values()]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pipe:
    """`fd-dsa chat` in this process, `said` on its stdin: status, stdout and stderr."""

    def run(*arguments: str, said: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        status = main(["chat", *arguments])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def test_lines_of_a_pipe_are_messages(pipe: Pipe) -> None:
    said = "Hi\n\nAnd?\n/reset\n/rest\nAgain\n/system Be brief.\nOnce more\n/exit\nnever\n"
    with running(FakeEngine()) as live:
        flags = ("--base-url", live.url, "--temperature", "0.5", "--seed", "3", "--system", "Hm.")
        status, out, errors = pipe(*flags, "--max-tokens", "50", said=said)
        assert (status, out) == (0, f"{ANSWER}\n" * 4), errors
        assert errors.startswith("unknown command '/rest'; did you mean /reset?")
        assert prompts(live) == [
            "system:Hm.\nuser:Hi\n>",
            f"system:Hm.\nuser:Hi\nassistant:{ANSWER}\nuser:And?\n>",
            "system:Hm.\nuser:Again\n>",
            "system:Be brief.\nuser:Once more\n>",
        ]
        _, params = list(live.engine.requests.values())[-1]
        assert (params.temperature, params.seed, params.max_tokens) == (0.5, 3, 50)


class Thinker:
    """Reasons before it answers."""

    name = "thinker"
    figures = "prompt 3"
    settings: ClassVar[dict[str, Any]] = {}

    def answer(self, messages: Sequence[dict[str, str]]) -> Generator[Event, None, None]:
        """See `ChatSession`."""
        yield from (
            Event("reasoning", "Let "),
            Event("reasoning", "me."),
            Event("content", str(len(messages))),
        )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_reasoning_is_shown_to_somebody_who_types_and_not_said_again(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Hi", "And?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    conversation = Conversation(Thinker(), None, is_terminal=is_terminal)
    assert conversation.run() == 0
    shown = capsys.readouterr()
    assert shown.out == "1\n3\n"
    assert shown.err.count("[reasoning] Let me.\n[prompt 3]\n") == 2 * is_terminal
    assert all(set(message) == {"role", "content"} for message in conversation.messages)


def test_reasoning_of_a_server_is_told_from_the_content() -> None:
    words = ("hm", "</think>", "Hello")
    with running(FakeEngine(words=words, renderer=DeepseekV32Encoding("{tool_schemas}"))) as live:
        session = ChatSession(f"{live.url}/v1", None, {"thinking": True})
        hello = [{"role": "user", "content": "Hi"}]
        assert list(session.answer(hello)) == [Event("reasoning", "hm"), Event("content", "Hello")]
        assert re.fullmatch(r"prompt \d+ · output 3 · [\d.]+ tok/s · TTFT \d+ ms", session.figures)


def test_half_an_answer_is_a_failure(pipe: Pipe) -> None:
    with scripted(lambda body: aborted()) as server:
        status, out, errors = pipe("--base-url", server.base_url, "-q", "Hi", said="")
    assert (status, out) == (1, "half\n")
    assert errors == "fd_dsa: error: finish_reason abort: the answer is incomplete\n"


def test_one_message(pipe: Pipe) -> None:
    with running(FakeEngine(max_model_len=60)) as live:
        flags = ("--base-url", live.url, "--system", "Hm.", "--top-k", "5", "-q")
        assert pipe(*flags, "Hi\nyou", said="not read\n") == (0, f"{ANSWER}\n", "")
        assert prompts(live) == ["system:Hm.\nuser:Hi\nyou\n>"]
        assert next(iter(live.engine.requests.values()))[1].top_k == 5
        assert pipe(*flags, "long " * 20, said="")[0] == 1


def test_settings_and_saved_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Pipe
) -> None:
    monkeypatch.chdir(tmp_path)
    said = [
        "/set",
        "/set temperature 0.5",
        "/set top-p 0.9",
        "/set",
        "Hi",
        "/set temperature",
        "/set thinking on",
        '"""one',
        'two"""',
        "/save talk.json",
        "/save talk.json",
        "/save no/such/folder.json",
        "/set tempera 1",
        "/set seed many",
        "/set seed",
        "/help",
    ]
    with running(FakeEngine()) as live:
        text = "\n".join(said).replace("\\", "") + "\n"
        status, out, errors = pipe("--base-url", live.url, said=text)
        assert (status, out) == (0, f"{ANSWER}\n" * 2)
        assert prompts(live)[1] == f"user:Hi\nassistant:{ANSWER}\nuser:one\ntwo\n>"
        first, second = (params for _, params in live.engine.requests.values())
        assert (first.temperature, first.top_p) == (0.5, 0.9)
        assert (second.temperature, second.top_p) == (1.0, 0.9)
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["settings"] == {"top_p": 0.9, "thinking": True}
    assert [message["content"] for message in saved["messages"]] == [
        "Hi",
        ANSWER,
        "one\ntwo",
        ANSWER,
    ]
    lines = errors.splitlines()
    assert lines[:2] == ["all settings are those of the server", "temperature 0.5, top_p 0.9"]
    assert lines[2] == "4 messages are in talk.json"
    assert lines[3] == "fd_dsa: error: /save: talk.json cannot be written (file exists)"
    assert "(no such file or directory)" in lines[4]
    assert lines[5].endswith("did you mean temperature?")
    assert lines[6].startswith("fd_dsa: error: /set seed: got 'many'; must be a whole number")
    assert lines[7] == "fd_dsa: error: /set: 'seed' is not set; /set NAME VALUE sets one"
    assert lines[8].startswith("  /help")


def test_a_pasted_text_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    with (
        running(FakeEngine()) as live,
        chat_on_terminal(tmp_path, "--base-url", live.url, term="xterm") as (process, terminal),
    ):
        wait_for(terminal, "> ")
        os.write(terminal, b"\x1b[200~one\ntwo\nthree\x1b[201~\r")
        wait_for(terminal, " tok/s · TTFT ")
        os.write(terminal, b"/exit\r")
        assert process.wait(60) == 0
        assert prompts(live) == ["user:one\ntwo\nthree\n>"]


def test_a_failed_answer_ends_a_pipe_with_status_one(
    pipe: Pipe,
) -> None:
    with running(FakeEngine(max_model_len=20)) as live:
        status, out, errors = pipe("--base-url", live.url, said=f"{'long ' * 20}\nHi\n")
        assert (status, out) == (1, "")
        assert "fd_dsa: error: status 400: messages: the prompt has" in errors


def test_starts_that_fail_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with (
        running(FakeEngine(), api_key=("secret",)) as live,
        running(FakeEngine()) as keyless,
    ):
        cases = {
            ("--base-url", live.url): "OPENAI_API_KEY",
            ("--base-url", "nowhere"): "--base-url: got 'nowhere'",
            ("--temperature", "hot"): "--temperature: got 'hot'",
            ("--system", "\udcff"): "--system: got '\\udcff'; must be UTF-8",
            ("no/such/folder",): "error: MODEL: got 'no/such/folder', allowed: a local folder",
            ("",): "error: MODEL: got '', allowed: a local folder",
            ("other", "--base-url", keyless.url): "error: MODEL: got 'other'; the server at",
            ("-q", " "): "-q/--quick: got ' '; must be a text that is not empty, in UTF-8",
        }
        for arguments, reason in cases.items():
            assert main(["chat", *arguments]) == 2
            shown = capsys.readouterr()
            assert shown.out == "" and reason in shown.err
            assert shown.err.count("\n") == 1


@contextmanager
def chat_on_terminal(
    folder: Path, *arguments: str, term: str = "dumb"
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`fd-dsa chat` on a terminal of its own, and our end of the terminal."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        console("chat", *arguments),
        cwd=folder,
        env={**environment(), "TERM": term},
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(inside)
    try:
        yield process, terminal
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_ctrl_c_stops_an_answer_on_a_terminal(tmp_path: Path) -> None:
    # longer than any machine needs to stop it
    endless = FakeEngine(words=WORDS * 1000, step_s=0.1, max_model_len=10_000)
    with (
        running(endless) as live,
        chat_on_terminal(tmp_path, "--base-url", live.url) as (process, terminal),
    ):
        wait_for(terminal, "> ")
        os.write(terminal, b"Hi\r")
        wait_for(terminal, WORDS[0])
        os.write(terminal, b"\x03")
        wait_for(terminal, "\r\n> ")
        wait_until(lambda: len(live.engine.closed) == 1)
        # what came of the answer is a part of the conversation
        os.write(terminal, b"Go on\r")
        wait_until(lambda: len(live.engine.requests) == 2)
        assert prompts(live)[1].startswith(f"user:Hi\nassistant:{WORDS[0]}")
        wait_for(terminal, WORDS[0])
        os.write(terminal, b"\x03")
        wait_for(terminal, "\r\n> ")
        os.write(terminal, b"/exit\r")
        assert process.wait(60) == 0


def test_ctrl_c_before_the_first_word_takes_the_question_back(tmp_path: Path) -> None:
    silent = FakeEngine(step_s=3600)
    with (
        running(silent) as live,
        chat_on_terminal(tmp_path, "--base-url", live.url) as (process, terminal),
    ):
        wait_for(terminal, "> ")
        for asked in (1, 2):
            os.write(terminal, b"Hi %d\r" % asked)
            wait_until(lambda asked=asked: len(live.engine.requests) == asked)
            os.write(terminal, b"\x03")
            wait_for(terminal, "^C\r\n> ")
        assert prompts(live) == ["user:Hi 1\n>", "user:Hi 2\n>"]
        # Python's readline keeps a signal that comes between its prompt and its wait for a key
        # until the next key, so a person who sees no effect presses Ctrl-C again
        for _ in range(30):
            os.write(terminal, b"\x03")
            if shows(terminal, "\r\nfd_dsa: error: interrupted\r\n", 2):
                break
        assert process.wait(60) == 130


def test_ctrl_c_while_it_connects(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with chat_on_terminal(tmp_path, "--base-url", url) as (process, terminal):
            connection, _ = mute.accept()
            os.write(terminal, b"\x03")
            wait_for(terminal, "^Cfd_dsa: error: interrupted\r\n")
            assert process.wait(60) == 130
            connection.close()


def test_a_line_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    with running(FakeEngine()) as live:
        done = subprocess.run(
            console("chat", "--base-url", live.url),
            cwd=tmp_path,
            env={**environment(), "LC_ALL": "C"},
            input=b"Hi\nK\xc3\xb6\xff\nAgain\n",
            capture_output=True,
            timeout=300,
        )
        assert done.stdout.decode() == f"{ANSWER}\n"
        assert done.stderr.decode() == (
            "fd_dsa: error: stdin: got byte 0xff as character 3 of a line, allowed is UTF-8\n"
        )
        assert done.returncode == 1
        assert prompts(live) == ["user:Hi\n>"]


def test_without_a_stdin_there_is_nothing_to_ask(tmp_path: Path) -> None:
    with running(FakeEngine()) as live:
        shell = ["bash", "-c", '"$@" <&-', "bash", *console("chat", "--base-url", live.url)]
        done = subprocess.run(
            shell, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def own_terminal() -> None:
    """In the child: Ctrl-C of the terminal on stdin reaches it, also where the tests ignore it."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(terminal: int, text: str) -> None:
    """Read what a terminal shows until the text has come; fail after a minute."""
    assert shows(terminal, text, 60), text


def shows(terminal: int, text: str, seconds: float) -> bool:
    """Read a terminal until the text has come or the time is over."""
    deadline = time.monotonic() + seconds
    seen = b""
    # without the marks that turn bracketed paste on and off
    while text.encode() not in re.sub(rb"\x1b\[\?2004[hl]\r?", b"", seen):
        if not select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        seen += os.read(terminal, 4096)
    return True


@pytest.mark.slow
def test_the_demo_model_on_a_server_of_its_own(tmp_path: Path) -> None:
    said = "What is the capital of France?\n"
    done = run_console(tmp_path, "chat", "--max-tokens", "20", said=said)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""
