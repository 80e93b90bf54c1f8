"""Base class of all bodies, and validators for their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from fd_dsa.serve.errors import CUSTOM_ERROR, FieldError, show
from fd_dsa.serve.protocol.known_fields import IGNORED, Refused

TEXT: dict[str, Any] = {"type": "string"}
TEXTS: dict[str, Any] = {"type": "array", "items": TEXT}
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}


MAX_FIELDS = 128
"""Maximum number of fields, known and unknown, of an object that the API describes."""

MAX_ENTRIES = 4096
"""Maximum length of every list in a request, except prompts and token ids."""


class Body(BaseModel):
    """Base of all bodies: strict types, no NaN, unknown fields kept for a check."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    refused_fields: ClassVar[Mapping[str, Refused]] = {}

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: object) -> Any:
        """Refuse an object with too many fields before they are read."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise refuse(f"has {len(value)} fields; at most {MAX_FIELDS} are allowed")
        return value

    def check_supported(self) -> None:
        """Raise ApiError 400 for unsupported or contradictory fields."""
        check_further_fields(self.model_extra or {}, self.refused_fields)

    @property
    def unknown_fields(self) -> Sequence[str]:
        """Names of the fields that have a value and are not known to any table."""
        return [
            name
            for name, value in (self.model_extra or {}).items()
            if value is not None and name not in IGNORED and name not in self.refused_fields
        ]


def check_further_fields(
    fields: Mapping[str, object], refused: Mapping[str, Refused], path: str = ""
) -> None:
    """Raise ApiError 400 for a field with a value that this server does not support.

    Args:
        path: path of the object with the fields. It ends with a dot, or is empty for the body.
    """
    for name, value in fields.items():
        rule = refused.get(name)
        if rule is None or value is None:
            continue
        # 1 == True and 0 == False in Python, but `logprobs: 0` is not `logprobs: false`
        is_bool = isinstance(value, bool)
        if any(isinstance(v, bool) == is_bool and v == value for v in rule.neutral):
            continue
        allowed = " or ".join(show(v) for v in (*rule.neutral, None))
        hint = f"; use {rule.instead}" if rule.instead else ""
        reason = rule.reason or f"not supported, only {allowed}"
        raise FieldError(f"{path}{name}: got {show(value)}; {reason}{hint}", code=rule.code)


def refuse(message: str) -> PydanticCustomError:
    """Make a validator's error. Braces in the message are data, not placeholders."""
    # a lone surrogate from a request has no UTF-8 form
    text = message.encode("utf-8", "backslashreplace").decode()
    return PydanticCustomError(CUSTOM_ERROR, "{message}", {"message": text})


def at_most(num_entries: int) -> BeforeValidator:
    """Return a validator that refuses a longer list or object before reading its entries."""

    def check(value: object) -> Any:
        if isinstance(value, (list, dict)) and len(value) > num_entries:
            raise refuse(f"has {len(value)} entries; at most {num_entries} are allowed")
        return value

    return BeforeValidator(check)


def packed_json(value: object) -> bytes:
    """Return the shortest JSON text of a value, with null for NaN.

    Returns:
        The text. It is empty for half of a surrogate pair or a large integer, which only short
        bodies have.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        return b""


def is_token_ids(value: object) -> bool:
    """Return True for a non-empty list of integers (a bool is not an integer here)."""
    return isinstance(value, list) and bool(value) and all(type(t) is int for t in value)
