"""Which DSA path is live in a process that has FastDeploy in it, and why.

`python -m fd_dsa.fastdeploy_plugin.status FILE` imports FastDeploy, with its models and its worker,
and writes that to a file as JSON: what FastDeploy prints may be anything. The `probe` of
`launch/environment.py` starts it.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from fd_dsa.environment import fastdeploy_plugin_wanted, process_environment
from fd_dsa.errors import ConfigError, describe_error
from fd_dsa.fastdeploy_plugin import last_logged

_WORKER = "fastdeploy.worker.gpu_worker"
# from linux/prctl.h
_PR_SET_PDEATHSIG = 1


def report() -> dict[str, Any]:
    """What FastDeploy would use for DSA in this process, as plain JSON values.

    Returns:
        `error` (why FastDeploy cannot be imported; "" = it can) and `version` (of FastDeploy; "" =
        it does not say). Without an error also `live` (our backend, indexer and attention are
        bound), `why`, `runner_is_ours` and `checks` (the table of `tree_checks.py`). Without our
        runner the backend is complete; it only cannot tell a step without prefill.
    """
    try:
        import fastdeploy
    except Exception as error:
        return {"error": describe_error(error), "version": ""}
    from fd_dsa.fastdeploy_plugin.take_over import is_ours, live_backend
    from fd_dsa.fastdeploy_plugin.tree_checks import MODELS, UnsupportedTree, checks, imported

    try:
        imported(MODELS)
        why = live_backend().tree_summary if is_ours(live_backend()) else _why_not()
    except UnsupportedTree as error:
        why = str(error)
    try:
        # a worker's module needs the devices of a worker
        runner = import_module(_WORKER).ModelRunner
    except Exception:
        runner = None
    return {
        "error": "",
        "version": str(getattr(fastdeploy, "__version__", None) or ""),
        "live": is_ours(live_backend()),
        "why": why,
        "runner_is_ours": is_ours(runner),
        "checks": checks(),
    }


def _why_not() -> str:
    """Why FastDeploy's own names are still there."""
    environment = process_environment()
    try:
        if not fastdeploy_plugin_wanted():
            backend = environment.get("FD_ATTENTION_BACKEND")
            if backend != "DSA_ATTN":
                return f"FD_ATTENTION_BACKEND is {backend or 'unset'}, not DSA_ATTN"
            return "FD_DSA_DISABLE turns the plug-in off"
    except ConfigError as error:
        return str(error)
    plugins = environment.get("FD_PLUGINS")
    return last_logged().removeprefix("fd_dsa: ") or (
        f"FastDeploy has not loaded the plug-in fd_dsa: FD_PLUGINS is {plugins or 'unset'}, and "
        "must name it"
    )


if __name__ == "__main__":
    # nobody waits for the report of a process whose parent is gone
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    Path(sys.argv[1]).write_text(json.dumps(report()), "utf-8")
