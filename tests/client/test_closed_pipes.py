"""Commands whose reader has gone, as in `fd-dsa bench --help | true`, and commands on SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fd_dsa.cli import main
from tests.serve.conftest import wait_until
from tests.serve.processes import console, environment

COMMANDS = [
    console(),
    console("serve", "--help"),
    [sys.executable, "-m", "fd_dsa.accuracy", "--help"],
    # output that is not buffered
    [sys.executable, "-u", *console("version")[1:]],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[-2:]))
def test_a_command_whose_output_nobody_reads(tmp_path: Path, command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment(), "PYTHONUNBUFFERED": ""},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("version",), ("serve", "--help"), ("serve", "--dry-run")])
def test_a_full_disk_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    # the lines of the log may come first
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            console(*arguments),
            cwd=tmp_path,
            env={**environment(), "PYTHONUNBUFFERED": "1"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    line = "fd_dsa: error: an output cannot be written (no space left on device); make room, or"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(line)


def test_a_current_folder_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["bench", "--output", "out.json"]) == 2
    rule = "the current folder does not exist any more; change to another one"
    assert capsys.readouterr().err == f"fd_dsa: error: {rule}\n"


_LOSES_AN_INTERRUPT = """
import os, signal, sys, weakref
from fd_dsa import cli

def imports(name):
    # as importlib has it for the locks of modules: Python ignores errors of this function
    weakref.ref(set(), lambda _: signal.raise_signal(int(sys.argv[1])))
    raise SystemExit("the signal is lost")

cli.import_module = imports
cli.main(["bench"])
"""


def _signalled(number: int, prefix: str = "") -> tuple[int, str]:
    """Run a command that gets a signal during its imports, and return status and stderr."""
    code = prefix + _LOSES_AN_INTERRUPT
    command = [sys.executable, "-c", code, str(number)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("number", "word"), [(2, "interrupted"), (15, "terminated")])
def test_a_signal_during_an_import_is_not_lost(number: int, word: str) -> None:
    assert _signalled(number) == (128 + number, f"fd_dsa: error: {word}\n")


def test_a_job_in_the_background_ignores_an_interrupt_during_its_imports() -> None:
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    assert _signalled(2, ignored) == (1, "the signal is lost\n")


@pytest.mark.slow
# Paddle sets its own handlers about a second after its library is loaded
@pytest.mark.parametrize("wait_s", [0, 1.2, 1.6, 3])
def test_sigterm_is_one_line_without_a_stack_of_paddle(tmp_path: Path, wait_s: float) -> None:
    command_line = console("accuracy", "selection")
    with subprocess.Popen(
        command_line, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: "libpaddle" in maps.read_text() or process.poll() is not None, 60)
        time.sleep(wait_s)
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert (process.returncode, log.strip()) == (143, "fd_dsa: error: terminated")
