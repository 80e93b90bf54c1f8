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
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fd_dsa.fastdeploy_plugin.launch.choice import fastdeploy_version

_CHILD = "fd_dsa.fastdeploy_plugin.launch.probe_child"


@dataclass(frozen=True)
class Findings:
    """What came of importing FastDeploy.

    Attributes:
        error: why the import failed, in a line; "" where it did not.
        version: of FastDeploy; "" where it does not say.
        status: what `fd_dsa.fastdeploy_plugin.status` says there: which path is live and why.
    """

    error: str = ""
    version: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)


class Probe:
    """A child process that imports FastDeploy and reports.

    Args:
        environment: of the child: what FastDeploy's server would get.

    Use as a context manager: the block may do other things; `findings` waits.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._findings: Findings | None = None

    def __enter__(self) -> Probe:
        """Start the child."""
        self._folder = tempfile.TemporaryDirectory(prefix="fd_dsa-probe-")
        folder = Path(self._folder.name)
        self._report, self._output = folder / "report.json", folder / "output"
        # FastDeploy writes its logs and metrics somewhere when it is imported: not where we are
        environment = {
            **self._environment,
            "FD_LOG_DIR": str(folder / "log"),
            "PYTHONPATH": _with_working_folder(self._environment.get("PYTHONPATH", "")),
        }
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _CHILD, str(self._report)],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self

    def findings(self, timeout_s: float) -> Findings:
        """The report, waited for; the same at every call.

        Args:
            timeout_s: longest wait; a child that has said nothing by then is ended.
        """
        if self._findings is None:
            self._findings = self._wait(timeout_s)
        return self._findings

    def _wait(self, timeout_s: float) -> Findings:
        """The report, or why there is none."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return Findings(f"its import takes more than {timeout_s:g} s", fastdeploy_version())
        try:
            report = json.loads(self._report.read_text("utf-8"))
        except (OSError, ValueError):
            words = _last_line(self._output)
            return Findings(f"its import ended Python with status {status}: {words}")
        return Findings(**{**report, "version": fastdeploy_version() or report["version"]})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the child, if nobody waited for it."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _with_working_folder(path: str) -> str:
    """PYTHONPATH for a child in another folder, in which `python -m` finds what it finds here."""
    entries = ["", *filter(None, path.split(os.pathsep))]
    return os.pathsep.join(os.path.abspath(entry) for entry in entries)


def _last_line(file: Path) -> str:
    """The last line of an output that is not empty."""
    lines = file.read_text("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
