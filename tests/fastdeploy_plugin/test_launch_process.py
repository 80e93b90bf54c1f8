"""A launcher process and the server it starts: command, environment, output, signals, status."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from fd_dsa import __version__
from tests.fastdeploy_plugin.launcher import TIMEOUT_S, is_running, launcher
from tests.serve.conftest import wait_until

pytestmark = pytest.mark.slow

PORT_FLAGS = ("--port", "--metrics-port", "--engine-worker-queue-port", "--cache-queue-port")


def url_of(line: str) -> str:
    """The server's address in a ready line."""
    found = re.search(r"http://[\d.:]+", line)
    assert found is not None, line
    return found[0]


def without_locale(environment: dict[str, str]) -> dict[str, str]:
    """Without what Python adds by itself in a plain C locale."""
    return {name: text for name, text in environment.items() if name != "LC_CTYPE"}


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return without_locale(dict(entry.split("=", 1) for entry in entries if entry))


def value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_command_and_environment(tmp_path: Path) -> None:
    own = ("--port", "0", "--max-model-len", "128", "-tp", "2", "--served-model-name", "name")
    passed = ("--quantization", "block_wise_fp8", "--no-enable-prefix-caching", "--x=y z")
    env = {"FD_PLUGINS": "other , ", "FD_LOG_DIR": "there", "FD_DISABLE_CHUNKED_PREFILL": None}
    # a proxy is not asked for the health
    env |= {"http_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9"}
    with launcher(tmp_path, *own, "--", *passed, env=env) as live:
        ready, dump = live.ready_line(), live.dump()
        ports = [value(dump["argv"], flag) for flag in PORT_FLAGS]
        assert [int(port) - int(ports[0]) for port in ports] == [0, 1, 2, 3]
        assert dump["argv"] == [
            *("--model", str(tmp_path / "model"), "--served-model-name", "name"),
            *("--host", "127.0.0.1"),
            *(text for pair in zip(PORT_FLAGS, ports, strict=True) for text in pair),
            *("--tensor-parallel-size", "2", "--max-model-len", "128", "--block-size", "64"),
            *passed,
        ]
        assert dump["module"] == "fastdeploy.entrypoints.openai.api_server"
        changed = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "other,fd_dsa"}
        assert without_locale(dump["env"]) == environment_of(live.process.pid) | changed
        assert "FD_DISABLE_CHUNKED_PREFILL" not in dump["env"]
        url = f"http://127.0.0.1:{ports[0]}"
        assert re.sub(r"in [0-9.]+ s", "in N s", ready) == (
            f"fd_dsa {__version__} serves name with FastDeploy 1.2.3 on {url} (ready in N s, "
            f"max_model_len 128, API page {url}/docs, metrics http://127.0.0.1:{ports[1]}/metrics, "
            "Ctrl-C stops). Try:\n"
        )
        assert httpx.get(f"{url_of(ready)}/health", trust_env=False).status_code == 200
        live.process.terminate()
        status, _, log = live.finish()
        assert status == 0
        assert "imported: []\n" in log


def test_defaults_are_fastdeploys_own_but_the_interface(tmp_path: Path) -> None:
    """A key is passed on and not logged."""
    with launcher(tmp_path, "--", "--api-key", "secret") as live:
        ready, argv = live.ready_line(), live.dump()["argv"]
        flags = [text for text in argv if text.startswith("--")]
        own = ["--model", "--served-model-name", "--host", *PORT_FLAGS, "--block-size"]
        assert flags == [*own, "--api-key"] and argv[-1] == "secret"
        assert value(argv, "--served-model-name") == "model"
        assert "max_model_len 2048" in ready
        live.process.terminate()
        log = live.finish()[2]
    assert "max_model_len is 2048, FastDeploy's default; --max-model-len N" in log
    assert "starting FastDeploy 1.2.3: " in log and "--api-key '***'" in log
    assert "secret" not in log


def test_what_stands_after_the_dashes_takes_the_place_of_ours(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    passed = ["--model", "org/name", "--host", "0.0.0.0", "--port", str(port)]
    # the only model is the one after the dashes
    argv = ["--served-model-name", "n", "--", *passed, "--max-model-len", "640"]
    with launcher(tmp_path, *argv, model=False) as live:
        ready = live.ready_line()
        assert ready.startswith(f"fd_dsa {__version__} serves n with FastDeploy 1.2.3 on ")
        assert f"http://127.0.0.1:{port} " in ready and "max_model_len 640" in ready
        assert live.dump()["argv"][-len(passed) - 2 :] == [*passed, "--max-model-len", "640"]
        assert live.dump()["argv"].count("--model") == 1


@pytest.mark.parametrize(
    ("number", "end_with", "in_background"),
    [(signal.SIGTERM, 0, False), (signal.SIGINT, 7, False), (signal.SIGINT, 0, True)],
)
def test_a_signal_is_forwarded_once_and_the_status_is_the_servers(
    tmp_path: Path, number: signal.Signals, end_with: int, in_background: bool
) -> None:
    script = {"end_with": end_with}
    with launcher(tmp_path, script=script, ignores_interrupts=in_background) as live:
        live.ready_line()
        dump = live.dump()
        assert dump["ignored"] == []
        # Ctrl-C of a terminal does not reach the server a second time
        assert dump["session"] == dump["pid"] != os.getsid(live.process.pid)
        live.process.send_signal(number)
        status, _, log = live.finish()
        assert status == end_with
        assert log.count(f"signal {number.name}\n") == 1
        assert f"FastDeploy's server ended with status {end_with}\n" in log
        assert not is_running(dump["pid"])


def test_later_signals_are_forwarded_too(tmp_path: Path) -> None:
    with launcher(tmp_path, script={"counts": True}) as live:
        live.ready_line()
        assert live.process.stderr is not None
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            assert live.process.poll() is None
            live.process.send_signal(number)
            assert any(f"signal {number.name}\n" == line for line in live.process.stderr)
        assert live.finish()[0] == 0


@pytest.mark.parametrize(
    ("exit_with", "status", "words"),
    [
        (3, 3, "status 3"),
        (-11, 139, "status 139 (SIGSEGV)"),
        # FastDeploy returns 0 where its engine did not come up
        (0, 2, "status 0"),
    ],
)
def test_a_crash_at_the_start(tmp_path: Path, exit_with: int, status: int, words: str) -> None:
    """Output comes through unchanged, and the last line of it is repeated."""
    said = (
        "out \x1b[32mgreen\x1b[0m ü\nno end",
        "err\r\n\tTraceback\nRuntimeError: out of memory\n\n",
    )
    script: dict[str, Any] = {"exit_with": exit_with, "say": said}
    with launcher(tmp_path, script=script, env={"FD_LOG_DIR": "logs"}) as live:
        found, out, log = live.finish()
    assert (found, out) == (status, said[0])
    assert said[1].replace("\r\n", "\n") in log
    lines = [line for line in log.splitlines() if line.startswith("fd_dsa: error: ")]
    assert lines == [
        f"fd_dsa: error: FastDeploy's server ended with {words} before it was ready; its last "
        "words: RuntimeError: out of memory; its own logs are in logs/"
    ]


def test_the_wait_is_told(tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    # the launcher asks for longer than it takes from one line to the next
    script = {"load_until": str(loaded), "unwell": 30}
    with launcher(tmp_path, script=script) as live:
        assert live.process.stderr is not None
        told = (line for line in live.process.stderr if "still starting after" in line)
        waits = [next(told)]
        loaded.touch()
        live.ready_line()
        live.process.terminate()
        waits += told
    assert len(waits) >= 2, waits
    assert "/health gives ConnectError. FastDeploy answers once its workers" in waits[0]
    assert "/health gives status 404. " in waits[-1]
    assert "log/ (workerlog.0). Ctrl-C stops" in waits[0]


def test_a_signal_while_it_starts(tmp_path: Path) -> None:
    with launcher(tmp_path, script={"load_s": 3600}) as live:
        live.dump()
        live.process.send_signal(signal.SIGINT)
        status, out, log = live.finish()
    assert (status, out) == (0, "")
    assert "stopped while starting, with status 0" in log
    assert "fd_dsa: error" not in log and "Traceback" not in log


@pytest.mark.parametrize("script", [{}, {"ignore": ["SIGTERM"]}, {"stubborn": True}])
def test_a_killed_launcher_leaves_nothing_behind(tmp_path: Path, script: dict[str, Any]) -> None:
    with launcher(tmp_path, script={"workers": 2, **script}) as live:
        live.ready_line()
        dump = live.dump()
        processes = [dump["pid"], *dump["workers"]]
        assert len(processes) == 3 and all(map(is_running, processes))
        # with its whole group, as a job's owner or a container's stop would
        os.killpg(live.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, processes)), TIMEOUT_S)


def test_a_server_that_a_signal_ends(tmp_path: Path) -> None:
    """Its workers end before the launcher does."""
    with launcher(tmp_path, script={"workers": 2}) as live:
        live.ready_line()
        dump = live.dump()
        os.kill(dump["pid"], signal.SIGKILL)
        status, _, log = live.finish()
        assert not any(map(is_running, dump["workers"]))
    assert status == 128 + signal.SIGKILL
    assert "FastDeploy's server ended with status 137 (SIGKILL)\n" in log


def test_a_killed_guard_ends_the_server(tmp_path: Path) -> None:
    with launcher(tmp_path) as live:
        live.ready_line()
        server = live.dump()["pid"]
        guard = int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])
        assert guard != live.process.pid
        os.kill(guard, signal.SIGKILL)
        wait_until(lambda: not is_running(server), TIMEOUT_S)
        assert live.finish()[0] == 137


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launcher(tmp_path, "--port", str(port)) as live:
            status, _, log = live.finish()
    assert status == 2
    assert f"fd_dsa: error: 127.0.0.1:{port}: address already in use by process" in log
    assert not live.dump_file.exists()


def test_the_readers_of_its_output_may_go(tmp_path: Path) -> None:
    with launcher(tmp_path) as live:
        url = url_of(live.ready_line())
        assert live.process.stdout is not None and live.process.stderr is not None
        live.process.stdout.close()
        live.process.stderr.close()
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        live.process.terminate()
        assert live.process.wait(TIMEOUT_S) == 0
        assert not is_running(live.dump()["pid"])
