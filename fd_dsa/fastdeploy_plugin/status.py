"""Which DSA path is live in a process that has FastDeploy in it, and why.

`python -m fd_dsa.fastdeploy_plugin.status FILE` imports FastDeploy, with its models and its worker,
and writes that to a file as JSON: what FastDeploy prints may be anything. `launch.environment.probe`
starts it.
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
from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.entry_points import last_logged

_WORKER = "fastdeploy.worker.gpu_worker"
# from linux/prctl.h
_PR_SET_PDEATHSIG = 1


def report() -> dict[str, Any]:
    """What FastDeploy would use for DSA in this process, as plain JSON values.

    Returns:
        `error` (why FastDeploy cannot be imported; "" = it can) and `version` (of FastDeploy; "" =
        it does not say). Without an error also `live` (our backend is bound), `why`, `checks` (the
        table of `tree_checks.py`), and, where FastDeploy's models can be imported, the classes of
        `backend`, `indexer`, `attention` and `runner` ("" = none) by module and name, and
        `runner_is_ours`. Without our runner the backend is complete; it only cannot tell a step
        without prefill.
    """
    try:
        import fastdeploy
    except Exception as error:
        return {"error": _line(error), "version": ""}
    found = {"error": "", "version": str(getattr(fastdeploy, "__version__", None) or "")}
    try:
        return {**found, **_live()}
    except Exception as error:
        # a failure to find out is no failure of FastDeploy's
        return {**found, "live": False, "why": _line(error)}


def _live() -> dict[str, Any]:
    """Which classes are bound."""
    from fd_dsa.fastdeploy_plugin.take_over import is_ours, live_backend
    from fd_dsa.fastdeploy_plugin.tree_checks import MODELS, UnsupportedTree, checks, imported

    try:
        models = imported(MODELS)
    except UnsupportedTree as error:
        return {"live": False, "why": str(error), "checks": checks()}
    backend, runner = live_backend(), _runner()
    live = is_ours(backend)
    return {
        "live": live,
        "why": backend.tree_summary if live else _why_not(),
        "backend": _name(backend),
        "indexer": _name(getattr(models, "Indexer", None)),
        "attention": _name(getattr(models, "DeepseekV32DSAAttention", None)),
        "runner": _name(runner),
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


def _runner() -> Any:
    """The runner class that a worker of this process would make; None where it cannot say."""
    try:
        return getattr(import_module(_WORKER), "ModelRunner", None)
    except Exception:
        # a worker's module needs the devices of a worker
        return None


def _name(thing: Any) -> str:
    """Module and name of a class."""
    return "" if thing is None else f"{thing.__module__}.{thing.__qualname__}"


def _line(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


if __name__ == "__main__":
    # nobody waits for the report of a process whose parent is gone
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    Path(sys.argv[1]).write_text(json.dumps(report()), "utf-8")
