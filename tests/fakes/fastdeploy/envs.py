"""FastDeploy's environment variables, read at every access (`fastdeploy/envs.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def _switch(name: str) -> Callable[[], bool]:
    return lambda: bool(int(os.getenv(name, "0")))


environment_variables: dict[str, Callable[[], Any]] = {
    "FD_ATTENTION_BACKEND": lambda: os.getenv("FD_ATTENTION_BACKEND", "APPEND_ATTN"),
    # the names are not stripped
    "FD_PLUGINS": lambda: (
        os.environ["FD_PLUGINS"].split(",") if "FD_PLUGINS" in os.environ else None
    ),
    "FD_DISABLE_CHUNKED_PREFILL": _switch("FD_DISABLE_CHUNKED_PREFILL"),
    "ENABLE_V1_KVCACHE_MANAGER": _switch("ENABLE_V1_KVCACHE_MANAGER"),
    "FD_ENC_DEC_BLOCK_NUM": lambda: int(os.getenv("FD_ENC_DEC_BLOCK_NUM", "2")),
}


def __getattr__(name: str) -> Any:
    if name in environment_variables:
        return environment_variables[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
