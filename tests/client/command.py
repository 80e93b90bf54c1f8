"""The console script in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.serve.processes import environment

SCRIPT = "import sys; from fd_dsa.cli import main; sys.exit(main())"


def command(*arguments: str) -> list[str]:
    """How to start `fd-dsa` with these arguments."""
    return [sys.executable, "-c", SCRIPT, *arguments]


def run(folder: Path, *arguments: str, said: str | None = None) -> subprocess.CompletedProcess[str]:
    """`fd-dsa` run to its end, `said` on its stdin."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(),
        input=said if said is not None else "",
        capture_output=True,
        text=True,
        timeout=300,
    )
