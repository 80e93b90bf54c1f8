"""`fd-dsa run-batch`: OpenAI batch files in, answers out, refusals by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest

from fd_dsa.client import run_batch
from fd_dsa.client.run_batch import main
from tests.client.scripted import asked, chat, scripted
from tests.command_line.test_outputs import room_for
from tests.serve.conftest import running, wait_until
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.processes import console, environment, run_console

ANSWER = "".join(WORDS)
LOADING = {"error": {"message": "loading", "type": "unavailable", "param": None, "code": "loading"}}

# before 3.12 orjson counts the six characters of a surrogate as read
_LONE = 22 if orjson.__version__ < "3.12" else 16


def request(custom_id: str, text: str = "Hi", **body: Any) -> dict[str, Any]:
    """A line of a batch file."""
    messages = [{"role": "user", "content": text}]
    url = "/v1/chat/completions"
    body = {"messages": messages, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def written(folder: Path, *lines: Any) -> tuple[str, ...]:
    """Arguments of the command over a file with these lines."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "in.jsonl").write_text("\n".join(texts) + "\n")
    return ("-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"))


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """The output by the ids of the requests."""
    lines = (folder / "out.jsonl").read_text().splitlines()
    return {line["custom_id"]: line for line in map(json.loads, lines)}


def test_each_request_has_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completion = {
        **request("c"),
        "url": "/v1/completions",
        "body": {"model": "demo", "prompt": "a", "max_tokens": 3},
    }
    flags = written(tmp_path, request("a"), "", request("b", "long " * 20), completion)
    with running(FakeEngine(max_model_len=20)) as live:
        assert main([*flags, "--base-url", live.url]) == 1
    assert "2 of 3 requests answered" in capsys.readouterr().err
    found = answers(tmp_path)
    response = found["a"]["response"]
    assert response["body"]["choices"][0]["message"]["content"] == ANSWER
    assert (response["status_code"], found["a"]["error"]) == (200, None)
    assert response["request_id"] and found["a"]["id"] != found["c"]["id"]
    assert found["c"]["response"]["body"]["object"] == "text_completion"
    assert found["b"]["response"]["status_code"] == 400
    assert "prompt has" in found["b"]["response"]["body"]["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "line 2: is not valid JSON: column 2: unexpected end of data"),
        ("\udcff", "line 2: is not valid JSON: column 1: str is not valid UTF-8"),
        ('{"body": {"seed": 1e400}}', "JSON: column 19: number is infinity when parsed as double"),
        ('{"body": {"top_p": NaN}}', "line 2: is not valid JSON: column 20: unexpected character"),
        ('{"custom_id": "\\ud800"}', f"line 2: is not valid JSON: column {_LONE}: no low surrog"),
        ("[1]", "line 2: custom_id: got None, allowed: a text"),
        ({**request("b"), "custom_id": 5}, "line 2: custom_id: got 5, allowed: a text"),
        (request(""), "line 2: custom_id: got '', allowed: a text, not empty"),
        (request("a"), "line 2: custom_id: got 'a' again, line 1 has it"),
        ({**request("b"), "method": "GET"}, "line 2: method: got 'GET', allowed: 'POST'"),
        ({**request("b"), "url": "/v1/embeddings"}, "line 2: url: got '/v1/embeddings', allowed: "),
        ({**request("b"), "body": "x" * 200}, f"line 2: body: got '{'x' * 79}..., allowed: an obj"),
        (request("b", stream=True), "line 2: body.stream: got True, allowed: false"),
        (request("b", model="gpt"), "line 2: body.model: got 'gpt'; the server at "),
        (request("b", model=["a"]), "line 2: body.model: got ['a'], allowed: a text"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_sent_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Any, text: str
) -> None:
    flags = written(tmp_path, request("a"), line if line != "\udcff" else "")
    if line == "\udcff":
        (tmp_path / "in.jsonl").write_bytes(json.dumps(request("a")).encode() + b"\n\xff\n")
    with scripted(lambda body: chat("never")) as server:
        assert main([*flags, "--base-url", server.base_url]) == 2
        assert server.bodies == []
    shown = capsys.readouterr().err
    assert text in shown and shown.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_files_have_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = written(tmp_path, request("a"), request("b"))
    cases = [("MAX_REQUESTS", 1, "at most 1 requests; split it"), ("MAX_BYTES", 9, "at most 9;")]
    for name, limit, text in cases:
        with monkeypatch.context() as patch:
            patch.setattr(run_batch, name, limit)
            assert main([*flags]) == 2
            assert text in capsys.readouterr().err
            if name == "MAX_BYTES":
                # a device has the size 0
                assert main(["-i", "/dev/zero", *flags[2:]]) == 2
                assert f"/dev/zero: has more bytes, allowed: {text}" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert main(["-i", str(tmp_path / "pipe"), *flags[2:]]) == 2
    assert f"--input-file: {tmp_path}/pipe: is a pipe without a writer" in capsys.readouterr().err
    assert main(["-i", "", "-o", "x"]) == 2
    rule = "--input-file: '' cannot be read (no such file or directory)\n"
    assert capsys.readouterr().err == f"fd_dsa: error: {rule}"
    assert main([*flags[:3], str(tmp_path / "no" / "out")]) == 2
    assert "--output-file: " in capsys.readouterr().err
    assert main(written(tmp_path, "")) == 2
    assert "has no request" in capsys.readouterr().err


def test_a_server_that_goes_away_is_told_apart_from_refusals(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if asked(body) == "Bad":
            return 503, {"x-request-id": "7"}, LOADING
        return chat("half", reason="abort") if asked(body) == "Half" else (200, {}, b"no JSON")

    flags = written(tmp_path, request("a", "Bad"), request("b"), request("c", "Half"))
    with scripted(answer) as server:
        assert main([*flags, "--base-url", server.base_url, "--retries", "0"]) == 1
    found = answers(tmp_path)
    # the server's own reply
    assert found["a"]["response"] == {"status_code": 503, "request_id": "7", "body": LOADING}
    assert found["b"]["error"] == {"code": "no_reply", "message": "status 200 without JSON"}
    assert found["c"]["response"] is None
    assert found["c"]["error"]["message"] == "finish_reason abort: the answer is incomplete"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "got '', allowed: the name of a file"),
        ("folder", "folder is a folder; give a file"),
        ("link to folder", "link to folder is a folder; give a file"),
        ("no/out", "no/out: the folder does not exist; make it first"),
        ("in.jsonl", "in.jsonl is also the input; give another file"),
        ("link to input", "link to input is also the input; give another file"),
        ("linked", "linked.part, for results so far, is also the input; give another"),
    ],
)
def test_an_output_that_would_lose_data_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, rule: str
) -> None:
    flags = written(tmp_path, request("a"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link to folder").symlink_to("folder")
    for link in ("link to input", "linked.part"):
        (tmp_path / link).symlink_to("in.jsonl")
    before, names = (tmp_path / "in.jsonl").read_text(), sorted(tmp_path.iterdir())
    output = name and str(tmp_path / name)
    # without a request, because there is no server
    assert main([*flags[:2], "-o", output, "--base-url", "http://127.0.0.1:1/v1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fd_dsa: error: --output-file: ") and message.endswith(f"{rule}\n")
    assert (tmp_path / "in.jsonl").read_text() == before and sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize("is_link", [False, True])
def test_the_answers_of_an_interrupted_run_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_link: bool
) -> None:
    flags = written(tmp_path, request("a"))
    part = tmp_path / "out.jsonl.part"
    (tmp_path / "out.jsonl.part.1").write_text("first")
    if is_link:
        (tmp_path / "elsewhere").write_text("second")
        part.symlink_to("elsewhere")
    else:
        part.write_text("second")
    with running(FakeEngine()) as live:
        assert main([*flags, "--base-url", live.url]) == 0
    kept = [(tmp_path / f"out.jsonl.part.{number}").read_text() for number in (1, 2)]
    assert kept == ["first", "second"] and not part.exists()
    assert f"{part} of an earlier run is now {part}.2\n" in capsys.readouterr().err
    assert list(answers(tmp_path)) == ["a"]


def test_a_full_disk_keeps_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = written(tmp_path, *(request(str(number)) for number in range(20)))
    part = tmp_path / "out.jsonl.part"
    with running(FakeEngine()) as live, room_for(2048):
        assert main([*flags, "--base-url", live.url]) == 2
    line = f"fd_dsa: error: --output-file: {part} cannot be written (file too large)\n"
    assert capsys.readouterr().err.endswith(line)
    kept = part.read_text()
    assert kept.endswith("\n") and all(map(json.loads, kept.splitlines()))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_that_goes_on_keeps_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = written(tmp_path, request("a"), request("b", max_tokens=2))
    part = tmp_path / "out.jsonl.part"
    with running(FakeEngine(step_s=0.2)) as live, ThreadPoolExecutor() as pool:
        first = pool.submit(main, [*flags, "--base-url", live.url])
        wait_until(part.exists)
        assert main([*flags, "--base-url", live.url]) == 2
        assert first.result(60) == 0
    rule = f"{part} has results of a run that goes on; wait for it, or give another"
    assert f"fd_dsa: error: --output-file: {rule}\n" in capsys.readouterr().err
    assert set(answers(tmp_path)) == {"a", "b"} and not part.exists()


def test_an_output_behind_a_link_and_in_a_pipe(tmp_path: Path) -> None:
    flags = written(tmp_path, request("a"))
    (tmp_path / "link").symlink_to("out.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with running(FakeEngine()) as live, ThreadPoolExecutor() as pool:
        assert main([*flags[:3], str(tmp_path / "link"), "--base-url", live.url]) == 0
        read = pool.submit((tmp_path / "pipe").read_text)
        assert main([*flags[:3], str(tmp_path / "pipe"), "--base-url", live.url]) == 0
    assert (tmp_path / "link").is_symlink() and list(answers(tmp_path)) == ["a"]
    assert (tmp_path / "pipe").is_fifo()
    assert json.loads(read.result(10))["response"]["status_code"] == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_answers_that_came(tmp_path: Path, number: signal.Signals) -> None:
    flags = written(tmp_path, request("a", max_tokens=1), request("b"))
    with running(FakeEngine(step_s=0.5, words=WORDS * 1000, max_model_len=10_000)) as live:
        line = console("run-batch", *flags, "--base-url", live.url)
        with subprocess.Popen(
            line, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            part = tmp_path / "out.jsonl.part"
            wait_until(lambda: part.exists() and part.stat().st_size > 0)
            process.send_signal(number)
            _, log = process.communicate(timeout=60)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert log == f"fd_dsa: error: {word}; the answers that came are in {part}\n"
    assert process.returncode == 128 + number
    assert json.loads(part.read_text())["custom_id"] == "a"


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"OPENAI_API_KEY": "other"}])
def test_the_demo_model_on_a_server_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str]
) -> None:
    # keys of the operator's servers
    monkeypatch.setenv("FD_DSA_API_KEY", "first,second")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    flags = written(tmp_path, request("a", "What is the capital of France?", max_tokens=20))
    done = run_console(tmp_path, "run-batch", *flags, "--", "--max-num-seqs", "2")
    assert done.returncode == 0, done.stderr
    body = answers(tmp_path)["a"]["response"]["body"]
    assert "Paris" in body["choices"][0]["message"]["content"]
