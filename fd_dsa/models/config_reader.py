"""Typed reads of the JSON objects of a model folder, with errors that name file and field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fd_dsa.errors import ConfigError

# sizes and positions are int32 in kernels
INT32_MAX = (1 << 31) - 1


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: file not found; a model folder in Hugging Face format holds it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got a JSON {type(data).__name__}, allowed: an object")
    return data


class FieldReader:
    """Reads fields of one JSON object and remembers which, so that the rest can be reported.

    Args:
        source: name of the file, the start of each message.
        prefix: path of the object inside the file, with a dot at its end; empty at the top.
    """

    def __init__(self, data: dict[str, Any], source: str, prefix: str = "") -> None:
        self._data = data
        self.source = source
        self._prefix = prefix
        self._read: set[str] = set()
        self._sections: list[FieldReader] = []

    def error(self, name: str, got: object, allowed: str, hint: str = "") -> ConfigError:
        """The error of one field: file, field, got, allowed, what to do."""
        text = f"{self.source}: {self._prefix}{name}: got {got!r}, allowed: {allowed}"
        return ConfigError(f"{text}; {hint}" if hint else text)

    def raw(self, name: str, default: Any = None) -> Any:
        """The unconverted value; the default where it is absent (null stays null)."""
        self._read.add(name)
        return self._data.get(name, default)

    def integer(
        self, name: str, default: int | None, minimum: int = 1, maximum: int = INT32_MAX
    ) -> int:
        """An integer from `minimum` to `maximum`."""
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, value, f"an integer of at least {minimum}")
        if value > maximum:
            raise self.error(name, value, f"at most {maximum}")
        return value

    def positive(self, name: str, default: float | None) -> float:
        """A finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self.error(name, value, "a number above 0")
        return value

    def number(self, name: str, default: float | None) -> float:
        """A finite number."""
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, value, "a number")
        if not math.isfinite(value):
            raise self.error(name, value, "a finite number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def choice(self, name: str, default: Any, allowed: Sequence[Any], hint: str = "") -> Any:
        """One of the values that are supported; of the same type, so that true is not 1."""
        value = self.raw(name, default)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self.error(name, value, ", ".join(repr(one) for one in allowed), hint)
        return value

    def strings(self, name: str, allowed: Sequence[str], length: int) -> tuple[str, ...] | None:
        """One of the allowed words for each layer; None where the field is absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise self.error(name, value, f"a list of {length} entries, one a layer")
        for index, one in enumerate(value):
            if one not in allowed:
                raise self.error(f"{name}[{index}]", one, ", ".join(map(repr, allowed)))
        return tuple(value)

    def token_ids(self, name: str, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
        """Token ids of a field that holds null, one id or a list of them."""
        value = self.raw(name, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for one in ids:
            if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < vocab_size:
                raise self.error(
                    name, value, f"ids from 0 to {vocab_size - 1} (vocab_size {vocab_size})"
                )
        return tuple(ids)

    def token_id(self, name: str, vocab_size: int, default: int | None = None) -> int | None:
        """The token id of a field that holds null or one id."""
        ids = self.token_ids(name, vocab_size, default)
        if len(ids) > 1:
            raise self.error(name, list(ids), "null or one id")
        return ids[0] if ids else None

    def section(self, name: str) -> FieldReader | None:
        """Reader of an object inside this one; None where it is absent or null."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        reader = FieldReader(value, self.source, f"{self._prefix}{name}.")
        self._sections.append(reader)
        return reader

    def unread(self) -> list[str]:
        """Paths of the fields that nobody has read, also of sections, sorted."""
        own = [f"{self._prefix}{name}" for name in self._data if name not in self._read]
        return sorted(own + [name for section in self._sections for name in section.unread()])
