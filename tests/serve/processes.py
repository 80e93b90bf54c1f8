"""The server's command as a process, with the real engine or with one that a test makes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.serve.banner import read_banner
from tests.serve.conftest import wait_until

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
# body of an engine factory: the real engine and its process, without a model
FAKE = """
    from tests.engine.fakes import make_engine
    return make_engine(num_blocks=999, max_model_len=999, vocab_size=5000)
"""
# the same, with steps of 50 ms
SLOW = f"""
def make():{textwrap.indent(FAKE, "    ")}
engine = make()
run = engine.runner.execute_model
engine.runner.execute_model = lambda indices: (time.sleep(0.05), run(indices))[1]
return engine
"""
# the process of the engine, with a factory whose body is put in place of {body}
CHILD = """
import os, pathlib, sys, time, types
factory = types.ModuleType("fd_dsa.startup.build")
def build_engine(config, progress=None):
{body}
factory.build_engine = build_engine
sys.modules["fd_dsa.startup.build"] = factory
from fd_dsa.serve.engine_child import main
os._exit(main())
"""
# runs the command with another process of the engine
WITH_CHILD = """
import sys
from fd_dsa.serve.engine_process import EngineProcess
EngineProcess.COMMAND = (sys.executable, "-c", {child!r})
{before}
from fd_dsa.signals import command
from fd_dsa.serve.cli import main
with command():
    sys.exit(main())
"""


def child_of(body: str) -> str:
    """The program of the engine's process, with a factory of this body."""
    return CHILD.format(body=textwrap.indent(textwrap.dedent(body), "    "))


def command(*args: str, body: str | None = None, before: str = "") -> list[str]:
    """The command line, with an engine factory of this body and code before it, if given."""
    if body is None:
        return [sys.executable, "-m", "fd_dsa.serve", *args]
    return [sys.executable, "-c", WITH_CHILD.format(child=child_of(body), before=before), *args]


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


@dataclass
class Server:
    """A server process.

    Attributes:
        process: the process.
        log: file with its stderr.
        ready: the lines that it printed when it served, without the command after them.
        curl: that command.
        url: taken from the first line.
    """

    process: subprocess.Popen[str]
    log: Path
    ready: str = ""
    curl: str = ""
    url: str = ""

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def wait_until_healthy(self) -> None:
        """Return when it serves, where it can print nothing."""

        def serves() -> bool:
            assert self.process.poll() is None
            try:
                return httpx.get(f"{self.url}/health", timeout=TIMEOUT_S).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(serves, TIMEOUT_S)

    def client(self) -> openai.OpenAI:
        """The real client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ends(self, status: int = 0, number: signal.Signals = signal.SIGTERM) -> str:
        """Send a signal, wait for the end with this status; the whole log."""
        self.process.send_signal(number)
        assert self.process.wait(TIMEOUT_S) == status, self.log.read_text()
        return self.log.read_text()


@contextmanager
def started(
    folder: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    open_files: int | None = None,
    redirects: str = "",
    **code: Any,
) -> Iterator[Server]:
    """The command as a process, which need not serve yet.

    Args:
        folder: for its log; it has nothing to do with the package.
        flags: of the command.
        env: further variables.
        open_files: its `ulimit -n`; None leaves that of this process.
        redirects: of its streams, for a shell.
        code: as in `command`.
    """
    log = folder / "log.txt"
    limit = f"ulimit -n {open_files} && " if open_files else ""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            ["sh", "-c", f'{limit}exec "$0" "$@" {redirects}', *command(*flags, **code)],
            cwd=folder,
            env={**environment(), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        try:
            yield Server(process, log)
        finally:
            # with whatever it has started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@contextmanager
def serving(folder: Path, *flags: str, **more: Any) -> Iterator[Server]:
    """A server on a free port that serves; `more` as in `started`."""
    where = () if "FD_DSA_PORT" in more.get("env", ()) else ("--port", "0")
    with started(folder, *where, *flags, **more) as server:
        server.ready, server.curl = read_banner(server.line)
        url = re.search(r"http://[\d.]+:\d+", server.ready)
        assert url is not None, server.log.read_text()
        server.url = url[0]
        yield server


def console(*arguments: str) -> list[str]:
    """Return a command that starts `fd-dsa` with these arguments."""
    script = "import sys; from fd_dsa.cli import main; sys.exit(main())"
    return [sys.executable, "-c", script, *arguments]


def run_console(folder: Path, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    """`fd-dsa` run to its end, `said` on its stdin."""
    return subprocess.run(
        console(*arguments),
        cwd=folder,
        env=environment(),
        input=said,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
