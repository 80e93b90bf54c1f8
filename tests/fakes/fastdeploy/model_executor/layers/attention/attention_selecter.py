"""Class that FD_ATTENTION_BACKEND names (`layers/attention/attention_selecter.py`)."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastdeploy import envs
from fastdeploy.platforms import _Backend, current_platform
from fastdeploy.utils import resolve_obj_from_strname


def get_attention_backend() -> type[Any]:
    """The class that the environment names; ValueError for an unknown name."""
    return _get_attn_backend(envs.FD_ATTENTION_BACKEND)


@cache
def _get_attn_backend(selected_backend: str) -> type[Any]:
    member = _Backend.__members__.get(selected_backend)
    dotted = current_platform.get_attention_backend_cls(member)
    if not dotted:
        raise ValueError(f"Invalid attention backend for {current_platform.device_name}")
    return resolve_obj_from_strname(dotted)
