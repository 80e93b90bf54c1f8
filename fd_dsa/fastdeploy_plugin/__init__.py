"""fd_dsa inside FastDeploy: two plug-ins that replace FastDeploy's DSA path by ours.

Its plug-in loaders call `register` in every process, and `model_runner` in workers.

Both leave FastDeploy as it is unless FD_ATTENTION_BACKEND=DSA_ATTN asks for DSA, FD_DSA_DISABLE is
not set, and the installed tree has everything that `tree_checks.py` looks for.

Source of the loaders: FastDeploy's `plugins/model_register/__init__.py`,
`plugins/model_runner/__init__.py`, `model_executor/models/__init__.py`, `worker/gpu_worker.py`.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType

logger = logging.getLogger(__name__)

# the FastDeploy that was imported when the newest line was logged, and the line
_newest: tuple[ModuleType | None, str] = None, ""


def register() -> None:
    """Bind FastDeploy's names of the DSA path to ours; once, and only in a tree that fits.

    Never raises into FastDeploy, which would not survive it: whatever goes wrong leaves every name
    as it was and is one line in the log.

    Cost: host work alone; no device is touched, nothing is allocated there and no kernel module is
    imported.
    """
    try:
        from fd_dsa.environment import fastdeploy_plugin_wanted

        if fastdeploy_plugin_wanted():
            from fd_dsa.fastdeploy_plugin.take_over import is_ours, live_backend, take_over
            from fd_dsa.fastdeploy_plugin.tree_checks import MODELS, imported

            # importing the models for the first time runs `register` inside of this one
            imported(MODELS)
            if not is_ours(live_backend()):
                _log(logging.INFO, f"fd_dsa: serves FastDeploy's DSA path ({take_over()})")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        from fd_dsa.fastdeploy_plugin.tree_checks import describe

        _log(logging.WARNING, f"fd_dsa: unsupported FastDeploy tree ({describe(error)})")


def model_runner() -> type:
    """The class of FastDeploy's model runner: its own, with our hooks before it where ours serve.

    Raises:
        ImportError and whatever else FastDeploy's own runner raises when it is imported: there is
            no class to give then, and FastDeploy goes on as without a plug-in.
    """
    # imports the models, and so runs `register` where nobody has yet
    from fastdeploy.worker.gpu_model_runner import GPUModelRunner

    try:
        register()
        from fd_dsa.fastdeploy_plugin.take_over import is_ours, live_backend

        if not is_ours(live_backend()):
            return GPUModelRunner
        from fd_dsa.fastdeploy_plugin.runner import make_runner_class

        return make_runner_class(GPUModelRunner)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        from fd_dsa.fastdeploy_plugin.tree_checks import describe

        logger.warning("fd_dsa: FastDeploy's model runner stays as it is (%s)", describe(error))
        return GPUModelRunner


def _log(level: int, text: str) -> None:
    """Log a line once for each imported FastDeploy, where somebody sees it."""
    global _newest
    fastdeploy = sys.modules.get("fastdeploy")
    if _newest == (fastdeploy, text):
        return
    _newest = fastdeploy, text
    package = logging.getLogger("fd_dsa")
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    if not package.hasHandlers():
        # FastDeploy keeps what its processes print in files of its own
        package.addHandler(logging.StreamHandler())
    logger.log(level, text)


def last_logged() -> str:
    """What `register` has logged about the FastDeploy that is imported; "" = nothing."""
    return _newest[1] if _newest[0] is sys.modules.get("fastdeploy") else ""
