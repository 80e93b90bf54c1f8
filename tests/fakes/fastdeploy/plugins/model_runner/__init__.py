"""The plug-in that gives the runner's class (`plugins/model_runner/__init__.py`)."""

from __future__ import annotations

from typing import Any

from fastdeploy.plugins.utils import PLUGINS_GROUP, load_plugins_by_group

plugins_loaded = False


def load_model_runner_plugins() -> Any:
    """The class that the one plug-in of the group gives.

    Raises:
        AssertionError: there are several.
        StopIteration: there is none.
    """
    global plugins_loaded
    if plugins_loaded:
        return None
    plugins_loaded = True
    plugins = load_plugins_by_group(PLUGINS_GROUP.format("model_runner"))
    assert len(plugins) <= 1, "Plugin error: at most one model runner plugin is allowed"
    return next(iter(plugins.values()))()
