"""What a process with FastDeploy in it says about itself; asked in a child.

Importing FastDeploy imports its whole engine, starts plug-ins and leaves files behind, so the
launcher and the doctor never do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fd_dsa.fastdeploy_plugin.launch.choice import fastdeploy_version

_CHILD = "fd_dsa.fastdeploy_plugin.status"


def probe(environment: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    """Import FastDeploy in a child process.

    Args:
        environment: of the child: what FastDeploy's server would get.
        timeout_s: longest wait; a child that takes longer is ended.

    Returns:
        `fd_dsa.fastdeploy_plugin.status.report` of the child; `error` also where it has none.
    """
    version = fastdeploy_version()
    with tempfile.TemporaryDirectory(prefix="fd_dsa-probe-") as name:
        folder = Path(name)
        report, output = folder / "report.json", folder / "output"
        # FastDeploy writes its logs and metrics somewhere when it is imported: not where we are
        own = {
            "FD_LOG_DIR": str(folder / "log"),
            "PYTHONPATH": _with_working_folder(environment.get("PYTHONPATH", "")),
        }
        try:
            with output.open("wb") as file:
                status = subprocess.run(
                    [sys.executable, "-m", _CHILD, str(report)],
                    env={**environment, **own},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"its import takes more than {timeout_s:g} s", "version": version}
        try:
            found = json.loads(report.read_text("utf-8"))
        except (OSError, ValueError):
            last = last_line(output.read_bytes()) or "no output"
            error = f"its import ended Python with status {status}: {last}"
            return {"error": error, "version": version}
        return {**found, "version": version or found["version"]}


def last_line(output: bytes) -> str:
    """The last line that is not empty; "" without any."""
    lines = output.decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _with_working_folder(path: str) -> str:
    """PYTHONPATH for a child in another folder, in which `python -m` finds what it finds here."""
    entries = ["", *filter(None, path.split(os.pathsep))]
    return os.pathsep.join(os.path.abspath(entry) for entry in entries)
