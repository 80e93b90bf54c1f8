"""Commands whose reader has gone, as in `fd-dsa bench --help | true`: they end without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.processes import console, environment

COMMANDS = [
    [],
    ["--help"],
    ["version"],
    *([name, "--help"] for name in ("serve", "chat", "bench", "accuracy", "doctor")),
    ["accuracy", "ifeval", "--help"],
]


def unread(folder: Path, line: list[str], unbuffered: str = "") -> tuple[int, str]:
    """Status and stderr of a command whose stdout nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            line,
            cwd=folder,
            env={**environment(), "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_the_console_script(tmp_path: Path, arguments: list[str]) -> None:
    assert unread(tmp_path, console(*arguments)) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("module", ["serve", "accuracy", "doctor"])
def test_the_modules(tmp_path: Path, module: str) -> None:
    line = [sys.executable, "-m", f"fd_dsa.{module}", "--help"]
    assert unread(tmp_path, line) == (128 + signal.SIGPIPE, "")


def test_output_that_is_not_buffered(tmp_path: Path) -> None:
    assert unread(tmp_path, console("version"), "1") == (128 + signal.SIGPIPE, "")
