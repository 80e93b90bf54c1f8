"""Everything that the names of an imported FastDeploy stand for, to see what has changed."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

ATTENTION = "fastdeploy.model_executor.layers.attention"
MODELS = "fastdeploy.model_executor.models.deepseek_v3"
RUNNER = "fastdeploy.worker.gpu_model_runner"
WORKER = "fastdeploy.worker.gpu_worker"
# bookkeeping of the import system, which changes by itself
_IMPORT = ("__builtins__", "__spec__", "__loader__", "__warningregistry__")


def snapshot() -> dict[str, Any]:
    """Module or class and name -> object, for all modules of FastDeploy and classes in them."""
    found: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "fastdeploy":
            continue
        for name, value in list(vars(module).items()):
            if name not in _IMPORT:
                found[f"{module_name}:{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                for attribute, inner in vars(value).items():
                    found[f"{module_name}:{name}.{attribute}"] = inner
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names of modules known before that stand for another object, have come or have gone.

    Of a class that is another, its attributes are not listed.
    """
    modules = {name.partition(":")[0] for name in before}
    known = {name for name in after if name.partition(":")[0] in modules}
    same = {name for name in known & before.keys() if after[name] is before[name]}
    found = (known | before.keys()) - same
    return {name for name in found if name.rpartition(".")[0] not in found}


def import_all() -> None:
    """All modules that the plug-in binds names in, and a few around them."""
    for name in (ATTENTION, MODELS, RUNNER, f"{ATTENTION}.attention_selecter"):
        import_module(name)


def our_lines(records: list[logging.LogRecord]) -> list[str]:
    """What the plug-in has logged about the tree, in order."""
    lines = [record.getMessage() for record in records if record.name.startswith("fd_dsa")]
    return [line for line in lines if line.startswith("fd_dsa:")]
