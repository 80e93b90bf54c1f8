"""fd_dsa inside FastDeploy: two plug-ins that put our DSA path in the place of FastDeploy's own."""

from __future__ import annotations

from fd_dsa.fastdeploy_plugin.entry_points import model_runner, register

__all__ = ["model_runner", "register"]
