"""The child of a probe: `python -m fd_dsa.fastdeploy_plugin.launch.probe_child FILE`."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any

# from linux/prctl.h
_PR_SET_PDEATHSIG = 1


def main(file: str) -> None:
    """Import FastDeploy, and write what came of it to a file: its own output may say anything."""
    # nobody waits for the report of a process whose parent is gone
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    Path(file).write_text(json.dumps(report()), "utf-8")


def report() -> dict[str, Any]:
    """The fields of `probe.Findings`."""
    try:
        import fastdeploy
    except Exception as error:
        return {"error": _line(error), "version": "", "status": {}}
    found = {"error": "", "version": str(getattr(fastdeploy, "__version__", None) or "")}
    return {**found, "status": _status()}


def _status() -> dict[str, Any]:
    """Which path is live; a failure to find out is no failure of FastDeploy's."""
    try:
        from fd_dsa.fastdeploy_plugin.status import report as status

        return status()
    except Exception as error:
        return {"live": False, "why": _line(error)}


def _line(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


if __name__ == "__main__":
    main(sys.argv[1])
