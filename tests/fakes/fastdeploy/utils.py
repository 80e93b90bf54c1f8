"""Loggers and the lookup of dotted names (`fastdeploy/utils.py`)."""

from __future__ import annotations

import importlib
import logging
from typing import Any

llm_logger = logging.getLogger("fastdeploy")


def resolve_obj_from_strname(strname: str) -> Any:
    """The object of a dotted name; the attribute is looked up now, not when it was named."""
    module_name, _, attribute = strname.rpartition(".")
    return getattr(importlib.import_module(module_name), attribute)
