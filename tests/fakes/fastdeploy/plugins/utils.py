"""Entry points of a group, filtered by FD_PLUGINS (`plugins/utils.py`)."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from fastdeploy import _tree, envs
from fastdeploy.utils import llm_logger

PLUGINS_GROUP = "fastdeploy.{}_plugins"


def load_plugins_by_group(group: str) -> dict[str, Any]:
    """Return the objects of a group's allowed entry points, by name.

    An entry point that cannot be loaded is logged and left out. Two behaviours without FD_PLUGINS
    are public: all entry points are loaded, or none.
    """
    allowed = envs.FD_PLUGINS
    plugins = {}
    for found in entry_points(group=group):
        if allowed is None:
            if _tree.current().plugins_unset == "none":
                continue
        elif found.name not in allowed:
            continue
        try:
            plugins[found.name] = found.load()
            llm_logger.info("Loaded plugin %s of group %s", found.name, group)
        except Exception:
            llm_logger.exception("Failed to load plugin %s", found.name)
    return plugins
