"""Which DSA path is live in a process that has FastDeploy in it, and why.

`python -m fd_dsa.fastdeploy_plugin.status FILE` imports FastDeploy with its worker and writes the
answer to a file as JSON, because FastDeploy itself may print anything. The `probe` of
`launch/environment.py` starts it.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any

from fd_dsa.environment import fastdeploy_plugin_wanted, process_environment
from fd_dsa.errors import ConfigError, describe_error
from fd_dsa.fastdeploy_plugin import last_logged

_WORKER = "fastdeploy.worker.gpu_worker"
# from linux/prctl.h
_PR_SET_PDEATHSIG = 1


def report() -> dict[str, Any]:
    """Path that a worker would take for DSA if it started here, as plain JSON values.

    Returns:
        `error` (reason why FastDeploy cannot be imported; "" = it can) and `version` of FastDeploy
        ("" = unknown). Without an error also `live` (our models, backend and runner are in place),
        `why`, `own_path_variables` (variables that FastDeploy's own path needs) and `checks` (the
        table of `tree_checks.py`).
    """
    try:
        import fastdeploy
    except Exception as error:
        return {"error": describe_error(error), "version": ""}
    from fd_dsa.fastdeploy_plugin.take_over import is_ours, live_backend
    from fd_dsa.fastdeploy_plugin.tree_checks import BACKEND, V1_CACHES, checks, imported

    live, broken, variables = False, "", {}
    try:
        live = is_ours(imported(_WORKER).ModelRunner)
        if hasattr(BACKEND.find(), "create_kv_cache"):
            variables = {V1_CACHES: "1"}
    except Exception as error:
        broken = str(error)
    return {
        "error": "",
        "version": str(getattr(fastdeploy, "__version__", None) or ""),
        "live": live,
        "why": live_backend().tree_summary if live else _why_not(broken),
        "own_path_variables": variables,
        "checks": checks(),
    }


def _why_not(broken: str) -> str:
    """Why FastDeploy's own path is live; `broken` is an error of the import of its worker."""
    environment = process_environment()
    try:
        if not fastdeploy_plugin_wanted():
            backend = environment.get("FD_ATTENTION_BACKEND")
            if backend != "DSA_ATTN":
                return f"FD_ATTENTION_BACKEND is {backend or 'unset'}, not DSA_ATTN"
            return "FD_DSA_DISABLE turns the plug-in off"
    except ConfigError as error:
        return str(error)
    return last_logged().removeprefix("fd_dsa: ") or (
        broken
        or "FastDeploy has not loaded the plug-in fd_dsa: FD_PLUGINS is "
        f"{environment.get('FD_PLUGINS') or 'unset'}, and must name it"
    )


if __name__ == "__main__":
    # a report without a parent has no reader
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    Path(sys.argv[1]).write_text(json.dumps(report()), "utf-8")
