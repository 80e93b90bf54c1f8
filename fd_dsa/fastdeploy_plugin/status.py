"""Report of the DSA path that FastDeploy would run in a process, with the reason.

`python -m fd_dsa.fastdeploy_plugin.status FILE` imports FastDeploy with its worker and writes the
report to a file as JSON, because FastDeploy itself may print anything. The `probe` of
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
    """Return the DSA path of a worker that would start in this process, as plain JSON values.

    Returns:
        `error` is the reason why FastDeploy cannot be imported, "" if it can. `version` is that of
        FastDeploy, "" if unknown. Only without an error: `live` is True if fd_dsa's models, backend
        and runner are in place, and `why` is the reason. `own_path_variables` are variables that
        FastDeploy's own path needs. `checks` is the table of `tree_checks.py`.
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
        "why": live_backend().tree_summary if live else _inactive_reason(broken),
        "own_path_variables": variables,
        "checks": checks(),
    }


def _inactive_reason(broken: str) -> str:
    """Return why FastDeploy's own path is live.

    Args:
        broken: error of the import of its worker, "" without an error.
    """
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
    # end with the parent, which is the reader of the report
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    Path(sys.argv[1]).write_text(json.dumps(report()), "utf-8")
