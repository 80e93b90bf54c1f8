"""The command line: quick help, one line per failed start, and a start from any folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
import yaml

from fd_dsa import __version__
from fd_dsa.config import EngineConfig
from tests.serve.conftest import held_port
from tests.serve.test_end_to_end import wait_for_health
from tests.serve.test_errors import error_of

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180
# body of an engine factory: the real engine and its process, without a model
FAKE = """
    from tests.engine.fakes import make_engine
    return make_engine(num_blocks=999, max_model_len=999, vocab_size=5000)
"""
# the process of the engine, with a factory whose body is put in place of {body}
CHILD = """
import os, pathlib, sys, time, types
factory = types.ModuleType("fd_dsa.engine.factory")
def build_engine(config, progress=None):
{body}
factory.build_engine = build_engine
sys.modules["fd_dsa.engine.factory"] = factory
from fd_dsa.serve.engine_child import main
os._exit(main())
"""
# runs the command with another process of the engine
WITH_CHILD = """
import sys
from fd_dsa.serve.engine_process import EngineProcess
EngineProcess.COMMAND = (sys.executable, "-c", {child!r})
from fd_dsa.serve.cli import main
sys.exit(main())
"""


def command(*args: str, body: str | None = None) -> list[str]:
    """The command line, with a factory of our own if a body is given."""
    if body is None:
        return [sys.executable, "-m", "fd_dsa.serve", *args]
    child = CHILD.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    return [sys.executable, "-c", WITH_CHILD.format(child=child), *args]


def environment() -> dict[str, str]:
    """Makes the package importable from any folder, as an installed one is."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def finish(cwd: Path, line: list[str], status: int) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end, from `cwd`."""
    done = subprocess.run(
        line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == status, done.stderr
    return done


def run(
    cwd: Path, *args: str, body: str | None = None, status: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run the server's command line to its end, from `cwd`."""
    return finish(cwd, command(*args, body=body), status)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr that is no log line; stdout is empty."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [x for x in done.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d INFO ", x)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fd_dsa: error: ")
    return lines[0].removeprefix("fd_dsa: error: ")


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


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--max-model-length", "5"], "unknown flag --max-model-length; did you mean --max-mod"),
        (["--zzz"], "unknown flag --zzz; --help lists the flags"),
        (["--max-model", "5"], "unknown flag --max-model"),
        (["a", "b"], "unexpected argument 'b'"),
        (["a", "--model", "b"], "give one of them"),
        (["--port", "99999"], "--port: got '99999'; allowed is 0..65535"),
        (["--port", "http"], "--port: got 'http'"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout: got '-1'"),
        (["--max-num-seqs", "many"], "--max-num-seqs: got 'many'; allowed is a whole number"),
        (["--max-num-seqs", "0"], "--max-num-seqs: got 0"),
        (["--kv-cache-memory-bytes", "8X"], "--kv-cache-memory-bytes"),
        (["--dtype", "bfloat16"], "--dtype: got 'bfloat16'"),
        (["--kv-cache-dtype", "int8"], "--kv-cache-dtype: got 'int8'"),
        (["--tokenizer", "no/such"], "--tokenizer: got 'no/such', allowed: a local folder"),
        (["--load-format", "pt"], "--load-format: got 'pt', allowed: auto, safetensors, dummy"),
        (["--index-topk", "0"], "--index-topk: got 0, allowed: an integer of at least 1"),
        (
            ["--index-topk", "8193", "--device", "cpu", "--dry-run"],
            "got 8193, allowed: at most 8192",
        ),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization: got 1.5, allowed: above"),
        (["--no-enable-chunked-prefill"], "--enable-chunked-prefill: got False, allowed: True"),
        (["--cudagraph-capture-sizes", "2", "65"], "--cudagraph-capture-sizes: got 65, allowed"),
        (["--cudagraph-capture-sizes", "2", "x"], "--cudagraph-capture-sizes: got 'x'"),
        (["--cudagraph-capture-sizes", "2", "--enforce-eager"], "got [2] together with --enforce"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--engine", "turbo"], "--engine: invalid choice"),
        (["--device", "hopper:0"], "--device: invalid choice: 'hopper:0'"),
        (["--", "--num-servers", "8"], "--num-servers (after --) belongs to FastDeploy's launcher"),
        (["--", "--port"], "after --: argument --port: expected one argument"),
        (["--engine", "embedded", "-tp", "8"], "--tensor-parallel-size is 8, and --engine embedd"),
        (["--engine", "embedded", "--", "--ips", "a"], "--ips stands after --, and --engine em"),
        (["--tensor-parallel-size", "two"], "--tensor-parallel-size/-tp: got 'two'"),
        (["no/such/folder"], "--model: got 'no/such/folder'"),
        (["--host", "no.such.host.invalid"], "--host: got 'no.such.host.invalid'"),
    ],
)
def test_bad_flags_are_one_line(tmp_path: Path, args: list[str], text: str) -> None:
    assert text in error_line(run(tmp_path, *args))


def test_port_in_use_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        body = "raise SystemExit('the model was loaded')"
        line = error_line(run(tmp_path, "--port", str(port), body=body))
    # the process that has it is this one, and may be looked at
    owner = f"by process {os.getpid()} ("
    assert line.startswith(f"127.0.0.1:{port}: address already in use {owner}")
    assert "--port" in line


@contextmanager
def started(
    cwd: Path, *args: str, body: str, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command as a running process, with further variables."""
    process = subprocess.Popen(
        command(*args, body=body),
        cwd=cwd,
        env={**environment(), **(env or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_start_serve_and_stop_from_another_folder(tmp_path: Path) -> None:
    names = ("--served-model-name", "first", "--served-model-name", "second")
    with started(tmp_path, "--port", "0", *names, body=FAKE) as process:
        assert process.stdout is not None
        ready, curl = process.stdout.readline(), process.stdout.readline()
        assert ready.startswith(f"fd_dsa {__version__} serves first on http://127.0.0.1:")
        url = re.search(r"http://127\.0\.0\.1:\d+", ready)
        assert url is not None
        models = httpx.get(f"{url[0]}/v1/models", timeout=TIMEOUT_S).json()["data"]
        assert [m["id"] for m in models] == ["first", "second"]
        assert curl.startswith(f"curl {url[0]}/v1/chat/completions ")
        if shutil.which("curl"):
            subprocess.run(curl.strip() + " --fail", shell=True, check=True, capture_output=True)
        process.terminate()
        rest, log = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, rest) == (0, "")
        # one access line per request, none of uvicorn's own lines
        assert log.count("GET /v1/models") == 1
        assert "Uvicorn" not in log
        assert log.count("INFO chat: prompts by tokenizer_config.json, tool calls none") == 1


def test_a_server_needs_no_open_streams(tmp_path: Path) -> None:
    """As some start a daemon: the next files get the numbers of the closed ones."""
    with held_port() as port:
        words = shlex.join(command("--port", str(port), body=FAKE))
        process = subprocess.Popen(
            ["sh", "-c", f"exec {words} <&- >&- 2>&-"], cwd=tmp_path, env=environment()
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for_health(process, url, tmp_path / "none")
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
            process.terminate()
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()


def test_two_starts_on_one_port_leave_one_server(tmp_path: Path) -> None:
    """The second one comes while the first is loading."""
    wait = "print('loading', flush=True)\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)"
    body = f"{wait}\n{textwrap.dedent(FAKE)}"
    with held_port() as port, started(tmp_path, "--port", str(port), body=body) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "loading\n"
        line = error_line(run(tmp_path, "--port", str(port), body=body))
        assert line.startswith(f"127.0.0.1:{port}: address already in use by process {first.pid} (")
        (tmp_path / "go").touch()
        assert f"serves demo_model on http://127.0.0.1:{port}" in first.stdout.readline()


def test_dry_run_prints_the_plan_and_loads_nothing(tmp_path: Path) -> None:
    flags = ("--dry-run", "--device", "cpu", "--max-model-len", "512", "--api-key", "the-key")
    done = run(tmp_path, *flags, body="raise SystemExit('it was loaded')", status=0)
    told = yaml.safe_load(done.stdout)
    assert (told["max_model_len"], told["num_api_keys"], told["port"]) == (512, 1, 8000)
    assert told["max_prompt_bytes"] == 16 * 512
    assert told["memory"]["num_blocks"] > 0
    # a server has a target where the configuration has none
    assert told["target_inter_token_latency_ms"] == 200
    assert (told["chat_template"], told["tool_call_parser"]) == ("tokenizer_config.json", "none")
    assert "the-key" not in done.stdout + done.stderr
    assert done.stdout.startswith("# deepseek_v32 on the CPU")


def test_dry_run_refuses_what_a_start_refuses(tmp_path: Path) -> None:
    line = error_line(run(tmp_path, "--dry-run", "--kv-cache-memory-bytes", "900T"))
    assert "--kv-cache-memory-bytes" in line


def test_flags_of_a_file_and_of_variables_are_served(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("served-model-name: [of-the-file]\nmax-concurrency: 7\n")
    with started(
        tmp_path, "--config", "serve.yaml", body=FAKE, env={"FD_DSA_PORT": "0"}
    ) as process:
        assert process.stdout is not None
        assert " serves of-the-file on http://127.0.0.1:" in process.stdout.readline()


def test_a_misspelt_variable_is_a_warning(tmp_path: Path) -> None:
    with started(
        tmp_path, "--port", "0", body=FAKE, env={"FD_DSA_MAX_MODEL_LENGTH": "5"}
    ) as process:
        assert process.stdout is not None
        assert " serves demo_model on " in process.stdout.readline()
        process.terminate()
        _, log = process.communicate(timeout=TIMEOUT_S)
        assert "WARNING the variable FD_DSA_MAX_MODEL_LENGTH is none of fd_dsa's; did you" in log


def test_folder_without_template_gets_a_completions_line(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(EngineConfig().model_path / "tokenizer.json", folder)
    with started(tmp_path, "--port", "0", "--tokenizer", str(folder), body=FAKE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert "/v1/completions " in process.stdout.readline()
        process.terminate()
        _, log = process.communicate(timeout=TIMEOUT_S)
        assert "chat: none, the folder has no template; --chat-template FILE gives it one" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_health_tells_the_phase_while_the_model_loads(
    tmp_path: Path, number: signal.Signals
) -> None:
    body = """
        progress.done("read")
        progress.note("3 of 8 GiB")
        print("loading", flush=True)
        time.sleep(3600)
    """
    with held_port() as port, started(tmp_path, "--port", str(port), body=body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
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
        process.send_signal(number)
        _, log = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 128 + number
        assert log.splitlines()[-1] == "fd_dsa: error: interrupted while starting"
        assert "Traceback" not in log


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["version"], 0, f"fd_dsa {__version__}"),
        ([], 0, "usage: fd-dsa COMMAND"),
        (["dance"], 2, "unknown command 'dance'"),
        (["serve", "--zzz"], 2, "unknown flag --zzz"),
    ],
)
def test_console_script(args: list[str], status: int, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from fd_dsa.cli import main; sys.exit(main())", *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == status
    assert text in done.stdout + done.stderr
