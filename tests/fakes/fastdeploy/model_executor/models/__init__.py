"""All models; the import ends with the plug-ins (`model_executor/models/__init__.py`)."""

from __future__ import annotations

from fastdeploy.plugins.model_register import load_model_register_plugins

from . import deepseek_v3
from .model_base import ModelRegistry

__all__ = ["ModelRegistry", "deepseek_v3"]

# an exception of a plug-in's callable ends this import, as upstream
load_model_register_plugins()
