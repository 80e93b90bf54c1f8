"""The command line: quick help, one line per failed start, and a start from any folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import yaml

from fd_dsa import __version__
from fd_dsa.commands import own_command
from fd_dsa.config import EngineConfig
from fd_dsa.fastdeploy_plugin.launch import choice
from fd_dsa.serve import cli
from fd_dsa.serve.engine_process import EngineProcess
from fd_dsa.serve.flag_sources import parse_args
from fd_dsa.startup import hardware
from tests.serve.conftest import held_port
from tests.serve.processes import (
    FAKE,
    TIMEOUT_S,
    command,
    error_line,
    finish,
    run,
    serving,
    started,
)
from tests.serve.test_errors import error_of

BUG = "raise KeyError('surprise')"
FULL_HOST = MemoryError("\n---\nC++ Traceback\n0 f()\n\nResourceExhaustedError: Out of memory.")
FULL_GPU = OSError("\n---\nExternalError: CUDA error(2), out of memory.\n  [x]")
NO_MEMORY = "lower --gpu-memory-utilization, --kv-cache-memory-bytes"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command leaves the settings of this process as they are."""
    for name in ("set_up_logging", "share_heap", "keep_heap_trimmed", "freeze_objects"):
        monkeypatch.setattr(cli, name, lambda *_, **__: None)
    # an engine that is loaded is an error
    monkeypatch.setattr(EngineProcess, "COMMAND", (shutil.which("false"),))


def error_of_main(capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
    """Run the command in this process and return the only line that it prints."""
    assert cli.main(args) == status
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("fd_dsa: error: ")
    return shown.err.removeprefix("fd_dsa: error: ")


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("error", "status", "texts"),
    [
        (KeyError("surprise"), 1, ["unexpected KeyError: 'surprise'", "--log-level debug"]),
        (FULL_HOST, 2, ["not enough memory (", "Out of memory", NO_MEMORY]),
        (FULL_GPU, 2, ["not enough memory (", "out of memory", NO_MEMORY]),
    ],
    ids=["bug", "full host", "full GPU"],
)
def test_any_other_error_of_a_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    texts: list[str],
) -> None:
    monkeypatch.setattr(choice, "choose_engine", Mock(side_effect=error))
    line = error_of_main(capsys, "--port", "0", status=status)
    assert all(text in line for text in texts)


@pytest.mark.usefixtures("in_this_process")
def test_without_paddle_the_error_names_its_installation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "find_spec", lambda _: None)
    line = error_of_main(capsys, "--dry-run")
    assert "-m pip install " in line and "paddlepaddle" in line


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "--port", "0", "--log-level", "debug", body=BUG, status=1)
    assert "Traceback" in done.stderr
    assert "build_engine" in done.stderr
    assert done.stderr.splitlines()[-1] == "fd_dsa: error: unexpected KeyError: 'surprise'"


def test_too_little_address_space_is_one_line(tmp_path: Path) -> None:
    line = ["bash", "-c", 'ulimit -v 100000 && exec "$@"', "bash", *command("--port", "0")]
    message = error_line(finish(tmp_path, line, status=2))
    assert message.startswith("ulimit -v: got 100000, allowed: at least 1572864 (1.5 GiB)")


@pytest.mark.slow
def test_the_caches_fit_into_a_limited_address_space(tmp_path: Path) -> None:
    line = ["bash", "-c", 'ulimit -v 3000000 && exec "$@"', "bash", *command("--dry-run")]
    plan = yaml.safe_load(finish(tmp_path, line, status=0).stdout)
    assert 0 < plan["memory"]["kv_cache_bytes"] < plan["memory"]["free_bytes"] < 3_000_000 << 10


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".cache").touch()
    line = ["env", f"HOME={tmp_path}", *command("--dry-run", "--device", "cpu")]
    message = error_line(finish(tmp_path, line, status=2))
    assert message.startswith("HOME: Paddle needs a folder .cache/paddle below it")


def test_help_lists_every_engine_flag_and_imports_little(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fd_dsa.serve.cli import main\n"
        "try:\n    main(['--help'])\nfinally:\n"
        "    heavy = {'paddle', 'fastapi', 'uvicorn', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "    print('imported:', sorted(heavy))"
    )
    done = finish(tmp_path, [sys.executable, "-c", code], status=0)
    assert done.stdout.endswith("imported: []\n")
    for field in fields(EngineConfig):
        assert re.search(rf" --{field.name.replace('_', '-')}[ ,\n]", done.stdout), field.name
    for group in ("model:", "server:", "cache:", "scheduler:", "logging:"):
        assert f"\n{group}\n" in done.stdout


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--max-model-length", "5"], "unknown flag --max-model-length; did you mean --max-mod"),
        (["--zzz"], "unknown flag --zzz; --help lists the flags"),
        (["--max-model", "5"], "unknown flag --max-model"),
        (
            ["--engine", "embed"],
            "--engine: got 'embed', allowed: auto, embedded, fastdeploy; did you mean embedded?",
        ),
        (["--max-model-len", "1.0005k"], "--max-model-len: got '1.0005k'; must be a whole"),
        (
            ["--max-model-len", "32k", "--dry-run"],
            "--max-model-len: got 32k (32000), allowed: at most 8192",
        ),
        (["--help=cachee"], "--help: no topic 'cachee'; did you mean cache?"),
        (["a", "b"], "unexpected argument 'b'"),
        (["a", "--model", "b"], "give one of them"),
        (["--port", "65536"], "--port: got '65536'; must be 0 to 65535"),
        (["--port", "http"], "--port: got 'http'"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout: got '-1'"),
        (["--max-num-seqs", "many"], "--max-num-seqs: got 'many'; must be a whole number"),
        (
            ["--max-num-seqs", "-3"],
            "got '-3'; must be a whole number from 1 on; 32k is 32,000, 32K is 32,768",
        ),
        (["--max-concurrency", f"{2**63}"], f"got '{2**63}'; must be at most {2**63 - 1}"),
        (["--max-body-size", "9" * 400], "8G or 512MiB, below 2**63"),
        (["--tokenizer", "no/such"], "--tokenizer: got 'no/such', allowed: a local folder"),
        (["--load-format", "pt"], "--load-format: got 'pt', allowed: auto, safetensors, dummy"),
        (
            ["--index-topk", "8193", "--device", "cpu", "--dry-run"],
            "got 8193, allowed: at most 8192",
        ),
        (["--dry-run", "--kv-cache-memory-bytes", "900T"], "--kv-cache-memory-bytes"),
        (["--dry-run", "--max-model-len", "1000000"], "--max-model-len"),
        (["--no-enable-chunked-prefill"], "--enable-chunked-prefill: cannot be switched off"),
        (["--cudagraph-capture-sizes", "2", "x"], "--cudagraph-capture-sizes: got 'x'"),
        (["--cudagraph-capture-sizes", "2", "--enforce-eager"], "got [2] together with --enforce"),
        (["--engine", "turbo"], "--engine: got 'turbo', allowed: auto, embedded, fastdeploy"),
        (
            # another server may have the default port
            ["--engine", "fastdeploy", "--port", "0"],
            "FastDeploy is not installed in this Python; install it from Paddle's own package "
            "index (docs/fastdeploy.md has the commands), then fd_dsa into the same Python",
        ),
        (
            ["--data-parallel-size", "8"],
            "--data-parallel-size is 8, which needs FastDeploy, and that is not installed in "
            "this Python; install it from",
        ),
        (["--device", "hopper:0"], "--device: got 'hopper:0', allowed: auto, cpu, gpu"),
        (["--", "--num-servers", "8"], "--num-servers is given after --, which needs FastDeploy"),
        (["--engine", "embedded", "--data-parallel-size", "8"], "is 8, which --engine embedded"),
        (["-tp", "9"], "--tensor-parallel-size: got 9, allowed: at most 8, the GPUs of one mach"),
        (
            ["--dry-run", "-tp", "3"],
            "--tensor-parallel-size: got 3, allowed: a divisor of the model's num_attention_heads, "
            "8; take another one",
        ),
        (["--engine", "embedded", "--", "--ips", "a"], "--ips is given after --, which --engine"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size/-tp: got '0'; must be a who"),
        # of a script whose variable is not set
        (["--api-key", ""], "--api-key: allowed is a text of one character or more, none a space"),
        (["--api-key", "secret\n"], "--api-key: allowed is a text of one character or more"),
        (
            ["--max-prompt-bytes", "0"],
            "--max-prompt-bytes: got '0'; must be 1 byte or more: a number",
        ),
        (["--max-prompt-bytes", "long"], "--max-prompt-bytes: got 'long'; must be 1 byte or more"),
        (["--host", ""], "--host: got ''; must be a name or an address, 0.0.0.0 for all"),
        (["--served-model-name", ""], "--served-model-name: got '', allowed: a non-empty name"),
        (["no/such/folder"], "--model: got 'no/such/folder'"),
        (["org/name"], "a model of a hub: " + own_command("serve", "org/name", "--download")),
        (
            ["some/where/else", "--download"],
            "--download: got the model 'some/where/else'; allowed is a name such as",
        ),
        (["--host", "no.such.host.invalid"], "--host: got 'no.such.host.invalid'"),
        *((["--allowed-host", name], "a name without a port") for name in ("", "a:80", "a b")),
    ],
)
def test_bad_flags_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    text: str,
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    line = error_of_main(capsys, *args)
    assert text in line and "secret" not in line


def test_integers_may_have_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"32k": 32_000, "32K": 32_768, "1m": 10**6, "1M": 1 << 20, "25.6k": 25_600, "7": 7}
    for text, value in cases.items():
        assert parse_args(["--max-model-len", text]).max_model_len == value
    monkeypatch.setenv("FD_DSA_MAX_NUM_SEQS", "1k")
    assert parse_args([]).max_num_seqs == 1000


@pytest.mark.usefixtures("in_this_process")
def test_port_in_use_is_found_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = error_of_main(capsys, "--port", str(port))
    # the process that has it is this one, and may be looked at
    owner = f"by process {os.getpid()} ("
    assert line.startswith(f"127.0.0.1:{port}: address already in use {owner}")
    assert "--port" in line


def test_start_serve_and_stop_from_another_folder(tmp_path: Path) -> None:
    # a template without tools, beside a parser of calls
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    flags = "--served-model-name first --served-model-name second --tool-call-parser deepseek_v32"
    flags += " --chat-template plain.jinja"
    # a drain that waits for no request would take longer than the test has
    flags += " --shutdown-timeout 3600 --trust-remote-code --swap-space=4"
    # nearly the name of a flag's variable
    env = {"FD_DSA_MAX_MODEL_LENGTH": "5"}
    with serving(tmp_path, *flags.split(), body=FAKE, env=env) as server:
        first, *rest = server.ready.splitlines()
        assert first == f"fd_dsa {__version__} serves first on {server.url}"
        assert [line.split()[-1] for line in rest[:3]] == [
            f"{server.url}{path}" for path in ("/", "/docs", "/metrics")
        ]
        # nothing is printed twice, and lines fit a terminal
        assert "ready" not in server.ready and "max_model_len" not in server.ready
        assert max(map(len, (server.ready + server.curl).splitlines())) <= 80
        models = httpx.get(f"{server.url}/v1/models", timeout=TIMEOUT_S).json()["data"]
        assert [m["id"] for m in models] == ["first", "second"]
        assert server.curl.startswith(f"curl {server.url}/v1/chat/completions ")
        if shutil.which("curl"):
            line = f"{server.curl.strip()} --fail"
            subprocess.run(line, shell=True, check=True, capture_output=True)
        log = server.ends()
        assert server.line() == ""
    # one access line per request, none of uvicorn's own lines
    assert log.count("GET /v1/models") == 1
    # the time of the start; this engine has no phases
    assert len(re.findall(r"INFO \[\d/5\] \w+ +in \d+\.\d s\n", log)) == 1
    assert "Uvicorn" not in log
    assert log.count(", tool calls deepseek_v32, reasoning none\n") == 1
    assert "WARNING chat: --tool-call-parser deepseek_v32 reads calls, but the chat" in log
    assert "WARNING the variable FD_DSA_MAX_MODEL_LENGTH is unknown; did you mean" in log
    why = "--trust-remote-code is not needed here: no code of a model's folder runs"
    assert log.count(f"INFO {why}\n") == 1
    assert log.count("INFO --swap-space is not needed here: the scheduler") == 1


def test_flags_of_a_file_and_of_variables_are_served(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("served-model-name: [of-the-file]\nmax-concurrency: 7\n")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(EngineConfig().model_path / "tokenizer.json", folder)
    flags = ("--config", "serve.yaml", "--tokenizer", str(folder), "--allowed-host", "box.example")
    keys = ("secret-1", "secret-2")
    env = {"FD_DSA_PORT": "0", "FD_DSA_API_KEY": ",".join(keys)}
    with serving(tmp_path, *flags, body=FAKE, env=env) as server:
        ready, curl = server.ready, server.curl.strip()
        assert " serves of-the-file on http://127.0.0.1:" in ready
        assert "to a key of this server (export FD_DSA_API_KEY=KEY), try:" in ready
        assert max(map(len, (ready + curl).splitlines())) <= 80
        # the folder has no chat template
        assert "/v1/completions " in curl
        key = {"Authorization": f"Bearer {keys[0]}"}
        for host, status in (("evil.com", 403), ("box.example", 200), ("localhost:1", 200)):
            headers = {"Host": host, **key}
            answer = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60)
            assert answer.status_code == status
        # the variable of the shell may have one key, or the value that the server has
        tried = [(keys[1], 0), (",".join(keys), 0), ("another", 22)]
        for value, status in tried if shutil.which("curl") else ():
            line = ["bash", "-c", f"{curl} --fail --silent"]
            own = {**os.environ, "FD_DSA_API_KEY": value}
            done = subprocess.run(line, env=own, capture_output=True, text=True)
            assert done.returncode == status
            assert ('"choices":' in done.stdout) == (status == 0)
        log = server.ends()
    assert "INFO chat: none, the model folder has no chat template" in log
    assert not [key for key in keys if key in ready + curl + log]


def test_a_server_needs_no_open_streams(tmp_path: Path) -> None:
    """As some start a daemon: the next files get the numbers of the closed ones."""
    streams: dict[str, Any] = {"redirects": "<&- >&- 2>&-", "body": FAKE}
    with held_port() as port, started(tmp_path, "--port", str(port), **streams) as server:
        server.url = f"http://127.0.0.1:{port}"
        server.wait_until_healthy()
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code == 200
        server.ends()


@pytest.mark.usefixtures("in_this_process")
def test_dry_run_prints_the_plan_and_loads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--dry-run", "--device", "cpu", "--max-model-len", "512", "--api-key", "the-key")
    assert cli.main(flags) == 0
    done = capsys.readouterr()
    plan = yaml.safe_load(done.out)
    assert (plan["max_model_len"], plan["num_api_keys"], plan["port"]) == (512, 1, 8000)
    assert plan["max_prompt_bytes"] == 16 * 512
    assert plan["memory"]["num_blocks"] > 0
    # a server has a target where the configuration has none
    assert plan["target_inter_token_latency_ms"] == 200
    assert (plan["chat_template"], plan["tool_call_parser"]) == (
        "tokenizer_config.json",
        "deepseek_v32",
    )
    assert "the-key" not in done.out + done.err
    assert done.out.startswith("# deepseek_v32 on the CPU")


def test_health_tells_the_phase_while_the_model_loads(tmp_path: Path) -> None:
    body = """
        progress.done("read")
        progress.note("3 of 8 GiB")
        print("loading", flush=True)
        time.sleep(3600)
    """
    with held_port() as port, started(tmp_path, "--port", str(port), body=body) as server:
        assert server.line() == "loading\n"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as http:
            for path in ("/health", "/readyz", "/startupz", "/v1/models", "/server_info"):
                error = error_of(http.get(path), 503)
                assert (error["code"], error["type"]) == ("loading", "service_unavailable_error")
                assert "weights (phase 2 of 5, 3 of 8 GiB), " in error["message"]
                assert re.search(r"\d s since the start", error["message"])
            answer = http.post("/v1/completions", json={"prompt": "a"})
            assert error_of(answer, 503)["code"] == "loading"
            assert int(answer.headers["retry-after"]) > 0
            assert http.get("/livez").status_code == 200
            assert http.get("/version").json() == {"version": __version__}
            assert "fd_dsa:" not in http.get("/metrics").text
        log = server.ends(128 + signal.SIGTERM)
        assert log.splitlines()[-1] == "fd_dsa: error: interrupted while starting"
        assert "Traceback" not in log
