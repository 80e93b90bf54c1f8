"""What the models of all bodies are made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from fd_dsa.serve.errors import CUSTOM_ERROR

TEXT: dict[str, Any] = {"type": "string"}
TEXTS: dict[str, Any] = {"type": "array", "items": TEXT}
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}


class Body(BaseModel):
    """Base of all bodies: no conversion of types, no NaN, unknown fields kept for a look."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def refuse(message: str) -> PydanticCustomError:
    """An error of a validator; braces in the message are data, not placeholders."""
    # a lone surrogate of a request has no UTF-8 form
    text = message.encode("utf-8", "backslashreplace").decode()
    return PydanticCustomError(CUSTOM_ERROR, "{message}", {"message": text})


def is_token_ids(value: Any) -> bool:
    """True for a non-empty list of integers (a bool is none)."""
    return isinstance(value, list) and bool(value) and all(type(t) is int for t in value)
