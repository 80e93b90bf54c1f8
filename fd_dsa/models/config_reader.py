"""Typed reads of JSON files in a model folder, with errors that name the field."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fd_dsa.errors import ConfigError, shorten, system_reason, unique_object
from fd_dsa.models.known_fields import NULL_IS_ABSENT, is_harmless, same_value

# sizes and positions are int32 in kernels
INT32_MAX = (1 << 31) - 1
MAX_FILE_BYTES = 256 << 20
"""Max size of a file without weights. The largest tokenizers have 40 MB."""
_MAX_NAMES, _MAX_NAME = 12, 80
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
# models compute in float32, which makes infinities and zeros of other numbers
SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, 2.0**128 - 2.0**104


def has_file(path: Path) -> bool:
    """Return True if a folder has a file of this name, also a link without a target.

    The reader of the file reports such a link. Downloads of a hub are links into its cache, which
    may lose files.
    """
    return os.path.lexists(path)


def check_file(path: Path) -> None:
    """Refuse a file that cannot be read in bounded time and memory.

    Raises:
        ConfigError: the path is missing, is no regular file, such as a device or a pipe, or has
            more than `MAX_FILE_BYTES`.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: {describe_missing(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({system_reason(error)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: is no regular file; replace it by the model's own")
    if status.st_size > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path}: has {status.st_size} bytes, allowed: at most {MAX_FILE_BYTES}; replace it by "
            "the model's own"
        )


def describe_missing(path: Path) -> str:
    """Return the reason why a path leads to no file."""
    if path.is_symlink():
        return f"is a link to {shorten(os.readlink(path))}, which is missing; fetch it again"
    return "file not found; a model folder in Hugging Face format holds it"


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: see `check_file`. Or the file holds no JSON object, or one with a name twice.
    """
    check_file(path)
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({system_reason(error)})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got a JSON {type(data).__name__}, allowed: an object")
    return data


def parse_json(text: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError, RecursionError: the text is no JSON, or an object has a name twice. Or
            an escape is half of a surrogate pair, which no tokenizer accepts.
    """
    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique_object)
    if _SURROGATE_ESCAPE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def as_integer(value: object) -> int | None:
    """Convert a JSON integer, also one written as 64.0.

    Returns:
        The integer; None for any other value, true and false included.
    """
    if type(value) is int:
        return value
    return int(value) if type(value) is float and value.is_integer() else None


class FieldReader:
    """Reader of one JSON object that notes which fields it has read.

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
        """Return the error of one field: file, field, got, allowed, what to do."""
        text = f"{self.source}: {self._prefix}{name}: got {shorten(got)}, allowed: {allowed}"
        return ConfigError(f"{text}; {hint}" if hint else text)

    def raw(self, name: str, default: Any = None) -> Any:
        """Return the unconverted value.

        Returns:
            The default if the field is absent, or null and one of `NULL_IS_ABSENT`. Another null is
            None.
        """
        self._read.add(name)
        value = self._data.get(name, default)
        return default if value is None and name in NULL_IS_ABSENT else value

    def integer(
        self, name: str, default: int | None, minimum: int = 1, maximum: int = INT32_MAX
    ) -> int:
        """Read an integer from `minimum` to `maximum`."""
        given = self.raw(name, default)
        value = as_integer(given)
        if value is None or value < minimum:
            raise self.error(name, given, f"an integer of at least {minimum}")
        if value > maximum:
            raise self.error(name, given, f"at most {maximum}")
        return value

    def positive(self, name: str, default: float | None) -> float:
        """Read a finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self.error(name, value, "a number above 0")
        return value

    def number(self, name: str, default: float | None) -> float:
        """Read a finite number."""
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(name, value, "a finite number")
        if not SMALLEST_FLOAT <= abs(number) <= LARGEST_FLOAT and number:
            raise self.error(name, value, "a number that float32 holds, about 1e-38 to 3e38")
        return number

    def boolean(self, name: str, default: bool) -> bool:
        """Read true or false."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def choice(self, name: str, default: Any, allowed: Sequence[Any], hint: str = "") -> Any:
        """Read one of the `allowed` values. The value true is not 1, but 1.0 is."""
        value = self.raw(name, default)
        if not any(same_value(value, one) for one in allowed):
            raise self.error(name, value, ", ".join(repr(one) for one in allowed), hint)
        return value

    def strings(
        self, name: str, allowed: Sequence[str], length: int, spare: int = 0
    ) -> tuple[str, ...] | None:
        """Read one word per layer.

        Args:
            length: number of layers.
            spare: further entries that the list may have for MTP layers. They are checked and
                left out.

        Returns:
            `length` words; None if the field is absent.
        """
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not length <= len(value) <= length + spare:
            raise self.error(name, value, f"a list of {length} entries, one a layer")
        for index, one in enumerate(value):
            if one not in allowed:
                raise self.error(f"{name}[{index}]", one, ", ".join(map(repr, allowed)))
        return tuple(value[:length])

    def token_ids(self, name: str, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
        """Read a field that holds null, one token id or a list of them."""
        value = self.raw(name, default)
        given = value if isinstance(value, list) else [] if value is None else [value]
        ids = [as_integer(one) for one in given]
        if not all(one is not None and 0 <= one < vocab_size for one in ids):
            allowed = f"ids from 0 to {vocab_size - 1} (vocab_size {vocab_size})"
            raise self.error(name, value, allowed)
        return tuple(one for one in ids if one is not None)

    def check_token_id(self, name: str, vocab_size: int) -> None:
        """Check a field that holds null or one token id."""
        ids = self.token_ids(name, vocab_size)
        if len(ids) > 1:
            raise self.error(name, list(ids), "null or one id")

    def section(self, name: str) -> FieldReader | None:
        """Return the reader of an object inside this one, None if absent or null."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        reader = FieldReader(value, self.source, f"{self._prefix}{name}.")
        self._sections.append(reader)
        return reader

    def unknown_fields(self, *, allowed: bool) -> tuple[str, ...]:
        """Return unread fields that may change results, also those of sections.

        Args:
            allowed: False refuses them.

        Returns:
            Their paths, sorted; past the first ones their number.

        Raises:
            ConfigError: there is one, and they are not allowed; names them.
        """
        unknown = self._unknown()
        listed = [
            one[:_MAX_NAME] if one.isprintable() else repr(one[:_MAX_NAME]) for one in unknown
        ]
        listed = listed[:_MAX_NAMES]
        if more := len(unknown) - len(listed):
            listed.append(f"and {more} more")
        if allowed or not unknown:
            return tuple(listed)
        names = ", ".join(listed)
        value = shorten(next(iter(unknown.values())))
        raise ConfigError(
            f"{self.source}: {listed[0]}: got {value}, allowed: fields that fd_dsa knows, "
            f"since another may change results (unknown: {names}); use an engine that knows them, "
            "or, if they change no result, remove them or pass --allow-unknown-config-fields"
        )

    def _unknown(self) -> dict[str, Any]:
        """Return path and value of each field that is neither read nor harmless, by path."""
        unread = self._data.keys() - self._read
        found = {f"{self._prefix}{name}": self._data[name] for name in unread}
        found = {path: value for path, value in found.items() if not is_harmless(path, value)}
        for section in self._sections:
            found |= section._unknown()
        return dict(sorted(found.items()))
