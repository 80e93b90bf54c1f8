"""FastDeploy's own server as a child process; what `fd_dsa.serve` imports of the plug-in.

Nothing below imports FastDeploy.
"""

from fd_dsa.fastdeploy_plugin.launch.choice import choose_engine, refuse_for_embedded
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags, without_secrets
from fd_dsa.fastdeploy_plugin.launch.start import launch, prepare

__all__ = [
    "PassedFlags",
    "choose_engine",
    "launch",
    "prepare",
    "refuse_for_embedded",
    "without_secrets",
]
