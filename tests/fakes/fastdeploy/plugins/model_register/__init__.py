"""Plug-ins that run when the models package is imported (`plugins/model_register/__init__.py`)."""

from __future__ import annotations

from fastdeploy.plugins.utils import PLUGINS_GROUP, load_plugins_by_group

plugins_loaded = False


def load_model_register_plugins() -> None:
    """Call every plug-in of the group; what one raises reaches the importer of the models."""
    global plugins_loaded
    if plugins_loaded:
        return
    plugins_loaded = True
    for plugin in load_plugins_by_group(PLUGINS_GROUP.format("model_register")).values():
        plugin()
