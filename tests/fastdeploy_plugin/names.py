"""Names of an imported FastDeploy and their objects, to see what has changed."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

ATTENTION = "fastdeploy.model_executor.layers.attention"
MODELS = "fastdeploy.model_executor.models.deepseek_v3"
REGISTRY = "fastdeploy.model_executor.models.model_base"
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
    for name, model in sys.modules[REGISTRY].ModelRegistry._classes.items():
        found[f"registry:{name}"] = model
    return found


def changed(before: dict[str, Any]) -> set[str]:
    """Names that stand for another object now, among modules that were imported before."""
    after = snapshot()
    modules = {name.partition(":")[0] for name in before}
    known = {name for name in after if name.partition(":")[0] in modules}
    return {name for name in known | before.keys() if after.get(name) is not before.get(name)}


def import_all() -> Any:
    """Import what a worker imports, without its plug-in; returns FastDeploy's runner class."""
    import_module(f"{ATTENTION}.attention_selecter")
    import_module(MODELS)
    return import_module(RUNNER).GPUModelRunner


def registered_model() -> Any:
    """Class that FastDeploy constructs for DeepSeek-V3.2."""
    return sys.modules[REGISTRY].ModelRegistry.get_class("DeepseekV32ForCausalLM")


def our_lines(records: list[logging.LogRecord]) -> list[str]:
    """Lines of the plug-in about the tree, in order."""
    lines = [record.getMessage() for record in records if record.name.startswith("fd_dsa")]
    return [line for line in lines if line.startswith("fd_dsa:")]
