"""Fields that other servers know and this one refuses, unless their value changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fd_dsa.serve.errors import ApiError, show

logger = logging.getLogger("fd_dsa.serve")

# field -> values which leave the result as it is; None is always one of them
_COMPLETION: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "structural_tag": (),
}

_CHAT: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "add_special_tokens": (),
    "modalities": (["text"],),
    "audio": (),
}

NOT_YET = {**_COMPLETION, **_CHAT}


def check_extra_fields(fields: Mapping[str, Any]) -> None:
    """Raise ApiError 400 for a field of `NOT_YET` that would change the result.

    Args:
        fields: those of a body that its model does not declare.
    """
    for name, value in fields.items():
        neutral = NOT_YET.get(name)
        if neutral is None:
            logger.debug("unknown field %s is ignored", show(name))
            continue
        if value is None or any(_same(value, v) for v in neutral):
            continue
        allowed = " or ".join(show(v) for v in (*neutral, None))
        raise ApiError(
            400, f"{name}: got {show(value)}; not supported yet, only {allowed}", param=name
        )


def _same(value: Any, neutral: Any) -> bool:
    """Equality that tells false from 0: `logprobs: 0` asks for something."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
