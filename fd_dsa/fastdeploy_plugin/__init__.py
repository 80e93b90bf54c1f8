"""fd_dsa inside FastDeploy: plug-ins that replace its DSA path by that of fd_dsa.

FastDeploy's workers call `model_runner`, which replaces the models, the attention backend and the
runner together. Every process of FastDeploy calls `register`, which only warns if the workers will
not call `model_runner`.

Both functions replace a class only if FD_ATTENTION_BACKEND=DSA_ATTN asks for DSA, FD_DSA_DISABLE is
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

# module `fastdeploy` at the time of the newest log line, and the line
_newest: tuple[ModuleType | None, str] = None, ""


def register() -> None:
    """Warn if FastDeploy's workers will not use fd_dsa's runner class.

    No error reaches FastDeploy.
    """

    def check() -> None:
        from fd_dsa.fastdeploy_plugin.tree_checks import check_runner_plugins

        check_runner_plugins()

    _guarded(check)


def model_runner() -> type:
    """Return the class of FastDeploy's model runner, with fd_dsa's hooks in a supported tree.

    Raises:
        Exception: any error of the import of FastDeploy's own runner.

    Cost: host work only; no device is used and no kernel module is imported.
    """
    from fastdeploy.worker.gpu_model_runner import GPUModelRunner

    def take_over() -> type:
        from fd_dsa.fastdeploy_plugin.take_over import live_backend, take_over

        runner = take_over(GPUModelRunner)
        _log(logging.INFO, f"fd_dsa: serves FastDeploy's DSA path ({live_backend().tree_summary})")
        return runner

    return _guarded(take_over) or GPUModelRunner


def _guarded(work: Callable[[], type | None]) -> Any:
    """Run the work if the plug-in is wanted, and log its error.

    Returns:
        The result of the work, None after an error or if the plug-in is not wanted.
    """
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
    """Log a line once for each imported FastDeploy, to stderr without another handler."""
    global _newest
    fastdeploy = sys.modules.get("fastdeploy")
    if _newest == (fastdeploy, text):
        return
    _newest = fastdeploy, text
    package = logging.getLogger("fd_dsa")
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    if not package.hasHandlers():
        # FastDeploy keeps the stderr of its processes in its own files
        package.addHandler(logging.StreamHandler())
    logger.log(level, text)


def last_logged() -> str:
    """Return the newest line about the imported FastDeploy, "" without a line."""
    return _newest[1] if _newest[0] is sys.modules.get("fastdeploy") else ""
