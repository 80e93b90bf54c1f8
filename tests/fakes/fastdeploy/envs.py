"""FastDeploy's environment variables, read anew at every access (`fastdeploy/envs.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def _switch(name: str, default: str = "0") -> Callable[[], bool]:
    return lambda: bool(int(os.getenv(name, default)))


def _integer(name: str, default: str) -> Callable[[], int]:
    return lambda: int(os.getenv(name, default))


environment_variables: dict[str, Callable[[], Any]] = {
    "FD_ATTENTION_BACKEND": lambda: os.getenv("FD_ATTENTION_BACKEND", "APPEND_ATTN"),
    # the names are not stripped
    "FD_PLUGINS": lambda: (
        os.environ["FD_PLUGINS"].split(",") if "FD_PLUGINS" in os.environ else None
    ),
    "FD_DISABLE_CHUNKED_PREFILL": _switch("FD_DISABLE_CHUNKED_PREFILL"),
    "FD_DETERMINISTIC_MODE": _switch("FD_DETERMINISTIC_MODE"),
    "FD_DETERMINISTIC_SPLIT_KV_SIZE": _integer("FD_DETERMINISTIC_SPLIT_KV_SIZE", "16"),
    "ENABLE_V1_KVCACHE_MANAGER": _switch("ENABLE_V1_KVCACHE_MANAGER"),
    "ENABLE_V1_KVCACHE_SCHEDULER": _integer("ENABLE_V1_KVCACHE_SCHEDULER", "1"),
    "FD_ENC_DEC_BLOCK_NUM": _integer("FD_ENC_DEC_BLOCK_NUM", "2"),
    "FD_PD_REORDER": _switch("FD_PD_REORDER"),
    "FD_ENABLE_MULTI_API_SERVER": _switch("FD_ENABLE_MULTI_API_SERVER"),
    "FD_LOG_DIR": lambda: os.getenv("FD_LOG_DIR", "log"),
}


def __getattr__(name: str) -> Any:
    if name in environment_variables:
        return environment_variables[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
