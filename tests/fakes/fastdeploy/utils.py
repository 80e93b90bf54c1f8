"""Loggers and the lookup of dotted names (`fastdeploy/utils.py`)."""

from __future__ import annotations

import importlib
import logging
from typing import Any


def get_logger(name: str, file_name: str = "", **kwargs: Any) -> logging.Logger:
    """A logger of the double; FastDeploy writes a file of its own for each."""
    return logging.getLogger(f"fastdeploy.{name}")


llm_logger = get_logger("fastdeploy", "fastdeploy.log")


def resolve_obj_from_strname(strname: str) -> Any:
    """The object of a dotted name; the attribute is looked up now, not when it was named."""
    module_name, _, attribute = strname.rpartition(".")
    return getattr(importlib.import_module(module_name), attribute)
