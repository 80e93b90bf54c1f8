"""A double of FastDeploy for tests: its modules as far as a DSA plug-in meets them.

Written from the public interface; every module names the file of PaddlePaddle/FastDeploy that it
stands for, `tests/fakes/sources.py` the commits. Importing the real package imports the whole
engine and with it the models, so plug-ins run; this one does that only when a name asks for it.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

from fastdeploy import _tree

__version__ = "0.0.0+fake"
_LAZY = {
    "LLM": "fastdeploy.entrypoints.llm",
    "SamplingParams": "fastdeploy.engine.sampling_params",
    "ModelRegistry": "fastdeploy.model_executor.models.model_base",
}


def _torch_is_installed() -> bool:
    try:
        distribution("torch")
    except PackageNotFoundError:
        return False
    return True


if _tree.current().triton_wrapper == "no_torch" and not _torch_is_installed():
    # #6913: Triton's imports of torch are to find Paddle, if Triton comes later than this
    import paddle

    paddle.enable_compat(scope={"triton"})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name.startswith("__"):
        raise AttributeError(name)
    # the real package has imported all its parts by now
    if find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    # as upstream: a wrong name is a line on the terminal and None, so hasattr is always true
    print(f"module {__name__} has no attribute {name}")
    return None
