"""The words of the retrieval tasks: what is hidden, what is said before the text, what is asked.

`plain` asks for facts the way a reader would; `announced` has the form of RULER's prompts (the task
is told before the text, keys and names are made up), in words of its own. A JSON file may give any
other wording, RULER's own for example, with the fields of `Wording`.

Source of the tasks: RULER, arXiv 2404.06654 (needle in a haystack with one and with several keys,
variable tracking); pass keys: Mohtashami and Jaggi, arXiv 2305.16300.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any

from fd_dsa.errors import ConfigError


def _words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


CITIES = _words(
    """
    Oslo Paris Rome Madrid London Berlin Vienna Athens Lisbon Dublin Prague Warsaw Budapest
    Helsinki Stockholm Brussels Amsterdam Copenhagen Moscow Kyiv Cairo Nairobi Lagos Dakar Tunis
    Rabat Accra Lima Quito Bogota Havana Santiago Caracas Toronto Boston Chicago Denver Seattle
    Houston Dallas Tokyo Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Jakarta Manila Sydney
    Melbourne Perth Auckland Istanbul Ankara Baghdad Tehran Kabul Geneva Milan Naples Munich
    Hamburg
    """
)
ADJECTIVES = _words(
    """
    quiet bright hollow gentle rapid ancient silver narrow curious distant eager frozen golden
    humble velvet wooden crimson patient restless simple tidy upright vivid windy
    """
)
NOUNS = _words(
    """
    lamp river anchor basket candle desert engine feather garden hammer island jacket kettle
    ladder mirror needle orchard pencil quarry ribbon saddle temple umbrella violin wagon
    """
)


@dataclass(frozen=True)
class Wording:
    """Texts with placeholders in braces, and how keys, values and names look.

    Attributes:
        name: of the wording, for reports.
        passkey_before, passkey_needle, passkey_question: a hidden number; the needle has `{value}`.
        multikey_before, multikey_needle, multikey_question: numbers with keys; the needle has
            `{key}` and `{value}`, the question `{key}`.
        variables_before, variables_first, variables_next, variables_question: the first statement
            of a chain has `{name}` and `{value}`, the others `{name}` and `{source}`, the question
            `{value}`.
        arithmetic_before, arithmetic_question: a sum that has nothing to do with the text; the
            question has `{sum}`, such as 17 + 25.
        keys: of the numbers with keys.
        digits: of every hidden number.
        letters: capital letters of a variable's name.
        number_names: a digit from 1 to 9 ends a variable's name.
    """

    name: str
    passkey_before: str
    passkey_needle: str
    passkey_question: str
    multikey_before: str
    multikey_needle: str
    multikey_question: str
    variables_before: str
    variables_first: str
    variables_next: str
    variables_question: str
    arithmetic_before: str
    arithmetic_question: str
    keys: tuple[str, ...]
    digits: int
    letters: int
    number_names: bool


PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "passkey_needle": ("value",),
    "multikey_needle": ("key", "value"),
    "multikey_question": ("key",),
    "variables_first": ("name", "value"),
    "variables_next": ("name", "source"),
    "variables_question": ("value",),
    "arithmetic_question": ("sum",),
}
"""Placeholders of the texts that have any; each must stand in its text."""

_READ = "Read the text and answer the question at its end."

PLAIN = Wording(
    name="plain",
    passkey_before=_READ,
    passkey_needle="The pass key is {value}. Remember it.",
    passkey_question="What is the pass key?",
    multikey_before=_READ,
    multikey_needle="The special number for {key} is {value}.",
    multikey_question="What is the special number for {key}?",
    variables_before=_READ,
    variables_first="VAR {name} = {value}.",
    variables_next="VAR {name} = VAR {source}.",
    variables_question="Which variables have the value {value}?",
    arithmetic_before=_READ,
    arithmetic_question="What is {sum}?",
    keys=CITIES,
    digits=5,
    letters=1,
    number_names=True,
)

ANNOUNCED = Wording(
    name="announced",
    passkey_before="One special number is hidden in the following text. "
    "Keep it in mind, you will be asked about it.",
    passkey_needle="The special number hidden here is: {value}.",
    passkey_question="What is the special number that the text gives?",
    multikey_before="Several special magic numbers are hidden in the following text. "
    "Keep them in mind, you will be asked about one of them.",
    multikey_needle="One of the hidden magic numbers, the one for {key}, is: {value}.",
    multikey_question="What is the hidden magic number for {key} that the text gives?",
    variables_before="Follow the chains of assignments to variables which are hidden in the "
    "following text.",
    variables_first="VAR {name} = {value}.",
    variables_next="VAR {name} = VAR {source}.",
    variables_question="Name all variables that the text gives the value {value}, directly or "
    "through other variables.",
    arithmetic_before="The following text ends with a question.",
    arithmetic_question="How much is {sum}?",
    keys=tuple(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS),
    digits=7,
    letters=5,
    number_names=False,
)

WORDINGS = {wording.name: wording for wording in (PLAIN, ANNOUNCED)}


def read_wording(given: str) -> Wording:
    """The wording of a name, or of a JSON file; fields that the file leaves out are PLAIN's.

    Raises:
        ConfigError: neither a name nor a file; or the file is no JSON object, has an unknown
            field, a value of another type, or a text without one of its placeholders.
    """
    if given in WORDINGS:
        return WORDINGS[given]
    path = Path(given)
    if not path.is_file():
        raise ConfigError(
            f"--wording: {given!r} is neither {' nor '.join(WORDINGS)} nor a JSON file"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"--wording: {path} is no valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--wording: {path} holds a {type(data).__name__}, not an object")
    return _from_json(data, path)


def _from_json(data: Mapping[str, Any], path: Path) -> Wording:
    """PLAIN with the fields of the file."""
    known = {field.name: getattr(PLAIN, field.name) for field in fields(Wording)}
    values: dict[str, Any] = {"name": path.stem}
    for name, value in data.items():
        if name not in known:
            raise ConfigError(f"--wording: {path}: unknown field {name!r}; known: {list(known)}")
        if name == "keys":
            values[name] = _keys(value, path)
        elif type(value) is not type(known[name]):
            wanted = type(known[name]).__name__
            raise ConfigError(f"--wording: {path}: {name}: got {value!r}; must be of type {wanted}")
        else:
            values[name] = value
    wording = replace(PLAIN, **values)
    _check(wording, path)
    return wording


def _keys(value: Any, path: Path) -> tuple[str, ...]:
    """The keys as a tuple of distinct texts."""
    if not isinstance(value, list) or not all(isinstance(key, str) and key for key in value):
        raise ConfigError(f"--wording: {path}: keys: got {value!r}; must be a list of strings")
    if len(set(value)) < len(value) or not value:
        raise ConfigError(f"--wording: {path}: keys: {len(value)} entries; must be some, distinct")
    return tuple(value)


def _check(wording: Wording, path: Path) -> None:
    """Every placeholder stands in its text and no other does; sizes make enough names."""
    for field in fields(Wording):
        text = getattr(wording, field.name)
        if not isinstance(text, str):
            continue
        wanted = set(PLACEHOLDERS.get(field.name, ()))
        try:
            found = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
        except ValueError as error:
            raise ConfigError(f"--wording: {path}: {field.name}: {error}") from error
        if found != wanted:
            said = " and ".join(f"{{{name}}}" for name in sorted(wanted)) or "none"
            raise ConfigError(
                f"--wording: {path}: {field.name}: placeholders {sorted(found)}; needs {said}"
            )
    for name, low, high in (("digits", 4, 12), ("letters", 1, 8)):
        if not low <= getattr(wording, name) <= high:
            got = getattr(wording, name)
            raise ConfigError(f"--wording: {path}: {name}: got {got}; allowed {low} to {high}")
    if wording.letters == 1 and not wording.number_names:
        raise ConfigError(
            f"--wording: {path}: letters: got 1; without number_names a name needs 2, for words "
            "such as A stand in any text"
        )
