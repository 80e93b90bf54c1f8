"""fd_dsa inside FastDeploy: plug-ins that replace its DSA path by ours.

FastDeploy's workers call `model_runner`, which replaces the models, the attention backend and the
runner together. Every process of FastDeploy calls `register`, which only warns if the workers will
not call `model_runner`.

Both leave FastDeploy as it is unless FD_ATTENTION_BACKEND=DSA_ATTN asks for DSA, FD_DSA_DISABLE is
not set, and the installed tree passes the checks of `tree_checks.py`.

Source of the loaders: FastDeploy's `plugins/model_register/__init__.py`,
`plugins/model_runner/__init__.py`, `model_executor/models/__init__.py`, `worker/gpu_worker.py`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

# the FastDeploy that was imported when the newest line was logged, and the line
_newest: tuple[ModuleType | None, str] = None, ""


def register() -> None:
    """Warn if FastDeploy's workers will not take our runner class; never raises into FastDeploy."""

    def check() -> None:
        from fd_dsa.fastdeploy_plugin.tree_checks import check_runner_plugins

        check_runner_plugins()

    _guarded(check)


def model_runner() -> type:
    """The class of FastDeploy's model runner: ours in a supported tree, else FastDeploy's own.

    Raises:
        ImportError and whatever else FastDeploy's own runner raises when it is imported.

    Cost: host work only; no device is touched and no kernel module is imported.
    """
    from fastdeploy.worker.gpu_model_runner import GPUModelRunner

    def take_over() -> type:
        from fd_dsa.fastdeploy_plugin.take_over import live_backend, take_over

        runner = take_over(GPUModelRunner)
        _log(logging.INFO, f"fd_dsa: serves FastDeploy's DSA path ({live_backend().tree_summary})")
        return runner

    return _guarded(take_over) or GPUModelRunner


def _guarded(work: Callable[[], type | None]) -> Any:
    """Result of the work if the plug-in is wanted and nothing fails; an error is a log line."""
    try:
        from fd_dsa.environment import fastdeploy_plugin_wanted

        return work() if fastdeploy_plugin_wanted() else None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        from fd_dsa.fastdeploy_plugin.tree_checks import describe

        _log(logging.WARNING, f"fd_dsa: unsupported FastDeploy tree ({describe(error)})")
        return None


def _log(level: int, text: str) -> None:
    """Log a line once for each imported FastDeploy, at least to stderr."""
    global _newest
    fastdeploy = sys.modules.get("fastdeploy")
    if _newest == (fastdeploy, text):
        return
    _newest = fastdeploy, text
    package = logging.getLogger("fd_dsa")
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    if not package.hasHandlers():
        # FastDeploy keeps the output of its processes in files of its own
        package.addHandler(logging.StreamHandler())
    logger.log(level, text)


def last_logged() -> str:
    """Newest line about the imported FastDeploy, "" without one."""
    return _newest[1] if _newest[0] is sys.modules.get("fastdeploy") else ""
