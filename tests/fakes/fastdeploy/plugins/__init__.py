"""The two groups of plug-ins that a DSA model meets (`plugins/__init__.py`)."""

from .model_register import load_model_register_plugins
from .model_runner import load_model_runner_plugins

__all__ = ["load_model_register_plugins", "load_model_runner_plugins"]
