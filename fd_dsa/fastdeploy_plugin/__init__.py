"""fd_dsa inside FastDeploy: two plug-ins that replace FastDeploy's DSA path by ours."""

from __future__ import annotations

from fd_dsa.fastdeploy_plugin.entry_points import model_runner, register

__all__ = ["model_runner", "register"]
