"""Files of IFEval: prompts in the form of the official set, and official responses.

A prompt file holds one JSON object a line:

    {"key": 1000, "prompt": "...", "instruction_id_list": ["punctuation:no_comma", ...],
     "kwargs": [{}, ...]}

`kwargs` has one object of arguments for each instruction. Null arguments count as absent. Every
argument that an instruction has in the official set is required. The checkers would replace a
missing one by a random requirement that no answer has seen.

A response file, as google-research/instruction_following_eval reads it, holds `{"prompt": ...,
"response": ...}` a line, in any order. A response belongs to the prompt with the same text. The
benchmark's own files have one prompt in an older wording. So a remaining response goes to a prompt
without one if their texts are nearly the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from fd_dsa.accuracy.scores import shown
from fd_dsa.client.questions import Question
from fd_dsa.errors import ConfigError

OFFICIAL = Path(__file__).with_name("data") / "ifeval_prompts.jsonl"
"""The prompts of google-research/google-research, unchanged.

The NOTICE has their origin.
"""

_RELATIONS = ("at least", "less than")
_TEXT_RULE = "a text that is not empty"
_LINE_RULE = "one JSON object a line"
# the older wording and the present one have a similarity of 0.992
_SAME_PROMPT = 0.97


@dataclass(frozen=True)
class Prompt:
    """A prompt and the rules that its answer is checked against."""

    key: str
    text: str
    instruction_ids: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]

    def to_question(self, max_tokens: int) -> Question:
        """Return the prompt as one user message without a system prompt, as IFEval asks it."""
        rules = {"instruction_ids": list(self.instruction_ids), "kwargs": list(self.kwargs)}
        return Question(self.key, ({"role": "user", "content": self.text},), max_tokens, rules)


def read_prompts(path: Path | str | None = None) -> list[Prompt]:
    """Read the prompts of a file, in order. None = the official prompts."""
    if path is None:
        return list(_official().values())
    prompts: dict[str, Prompt] = {}
    lines: dict[str, int] = {}
    try:
        for number, data in _objects(path):
            prompt = _prompt(data, f"{path}:{number}: ")
            first = lines.setdefault(prompt.key, number)
            if first != number:
                raise ConfigError(
                    f"{path}:{number}: key: {prompt.key!r} is also the key of line {first}; keys "
                    "must be unique"
                )
            prompts[prompt.key] = prompt
    except OSError as error:
        raise ConfigError(
            f"prompts: {path} cannot be read ({error.strerror}); a JSONL file with one prompt "
            "a line is needed"
        ) from None
    if not prompts:
        raise ConfigError(f"prompts: {path} holds no prompt; at least one is needed")
    return list(prompts.values())


def _objects(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and JSON object of every line that is not empty."""
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            reason = str(error).split(": line ")[0]
            raise ConfigError(f"{path}:{number}: not JSON ({reason}); {_LINE_RULE}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path}:{number}: {shown(data)} is no JSON object; {_LINE_RULE}")
        yield number, data


def set_warning(prompts: Sequence[Prompt]) -> str | None:
    """Return a warning if scores of these prompts are not comparable with others.

    The official set returns None.
    """
    official = _official()
    count, rules = len(prompts), sum(len(prompt.instruction_ids) for prompt in prompts)
    if all(official.get(prompt.key) == prompt for prompt in prompts):
        if count == len(official):
            return None
        whole = sum(len(prompt.instruction_ids) for prompt in official.values())
        kind = f"partial set: {count} of {len(official)} prompts, {rules} of {whole} instructions"
    else:
        kind = f"not IFEval's official set: {count} prompts, {rules} instructions"
    return f"{kind}; comparable only with runs on the same prompts"


@cache
def _official() -> Mapping[str, Prompt]:
    """Return the official prompts by key, in order."""
    found = {}
    for _, data in _objects(OFFICIAL):
        kwargs = tuple(_without_nulls(given) for given in data["kwargs"])
        names = tuple(data["instruction_id_list"])
        found[str(data["key"])] = Prompt(str(data["key"]), data["prompt"], names, kwargs)
    return found


@cache
def arguments() -> Mapping[str, Mapping[str, type]]:
    """Return instruction -> its arguments with their types, taken from the official set."""
    found: dict[str, dict[str, type]] = {}
    for prompt in _official().values():
        for name, given in zip(prompt.instruction_ids, prompt.kwargs, strict=True):
            found[name] = {key: type(value) for key, value in given.items()}
    return dict(sorted(found.items()))


def _without_nulls(given: Mapping[str, object]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _prompt(data: Mapping[str, object], where: str) -> Prompt:
    """Parse the prompt of one line and check each field.

    Args:
        where: beginning of the errors.
    """
    fields: Any = map(data.get, ("key", "prompt", "instruction_id_list", "kwargs"))
    key, text, names, kwargs = fields
    given = f"{len(kwargs)} entries" if isinstance(kwargs, list) else shown(kwargs)
    for good, problem in (
        (
            isinstance(key, int | str) and not isinstance(key, bool) and key != "",
            f"key: {shown(key)}; a whole number or a text is needed",
        ),
        (_is_text(text), f"prompt: {shown(text)}; {_TEXT_RULE} is needed"),
        (
            isinstance(names, list) and names,
            f"instruction_id_list: {shown(names)}; a list of at least one instruction is needed",
        ),
        (
            isinstance(kwargs, list) and isinstance(names, list) and len(kwargs) == len(names),
            f"kwargs: {given}; one object for each instruction is needed",
        ),
    ):
        if not good:
            raise ConfigError(where + problem)
    pairs = zip(names, kwargs, strict=True)
    return Prompt(str(key), text, tuple(names), tuple(_checked(*pair, where) for pair in pairs))


def _checked(name: object, given: object, where: str) -> dict[str, Any]:
    """Check the arguments of one instruction. Returns them without nulls."""
    if not isinstance(name, str) or name not in arguments():
        known = ", ".join(arguments())
        raise ConfigError(f"{where}instruction_id_list: {shown(name)}; allowed are {known}")
    where = f"{where}kwargs of {name}: "
    if not isinstance(given, dict):
        raise ConfigError(f"{where}{shown(given)}; an object is needed")
    expected, kept = arguments()[name], _without_nulls(given)
    for key in kept:
        if key not in expected:
            allowed = ", ".join(expected) or "none"
            raise ConfigError(f"{where}{shown(key)}; allowed are {allowed}")
    for key, kind in expected.items():
        value = kept.get(key)
        if key.endswith("relation"):
            good, rule = value in _RELATIONS, " or ".join(map(repr, _RELATIONS))
        elif kind is int:
            good, rule = type(value) is int and value > 0, "a whole number of 1 or more"
        elif kind is str:
            good, rule = _is_text(value), _TEXT_RULE
        else:
            good = isinstance(value, list) and bool(value) and all(map(_is_text, value))
            rule = "a list of non-empty texts"
        if not good:
            found = f": {shown(value)}" if key in kept else " is missing"
            raise ConfigError(f"{where}{key}{found}; {rule} is needed")
    return kept


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_response_file(path: Path) -> bool:
    """Return True if the first line of a file is a response."""
    try:
        with path.open("rb") as file:
            entry = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(entry, dict) and "prompt" in entry and "response" in entry


def read_responses(path: Path, prompts: Sequence[Prompt]) -> tuple[dict[str, str], list[str]]:
    """Return key -> response to these prompts, and notes for readers of the scores."""
    keys = {prompt.text: prompt.key for prompt in prompts}
    texts: dict[str, str] = {}
    unknown: dict[int, tuple[str, str]] = {}
    lines: dict[str, int] = {}
    for number, data in _objects(path):
        both: Any = data.get("prompt"), data.get("response")
        prompt, response = both
        for name, text in zip(("prompt", "response"), both, strict=True):
            if not isinstance(text, str):
                raise ConfigError(f"{path}:{number}: {name}: {shown(text)}; a text is needed")
        if prompt in lines:
            raise ConfigError(
                f"{path}:{number}: prompt: {shown(prompt)} is also the prompt of line "
                f"{lines[prompt]}; each prompt has one response"
            )
        lines[prompt] = number
        if prompt in keys:
            texts[keys[prompt]] = response
        else:
            unknown[number] = prompt, response
    reworded = []
    for number, (prompt, response) in unknown.items():
        free = [text for text, key in keys.items() if key not in texts]
        near = get_close_matches(prompt, free, n=1, cutoff=_SAME_PROMPT)
        if not near:
            raise ConfigError(
                f"{path}:{number}: prompt: {shown(prompt)} is not one of the {len(prompts)} "
                "prompts; --prompts names the file that it is from"
            )
        texts[keys[near[0]]] = response
        reworded.append(keys[near[0]])
    notes = []
    if missing := [prompt.key for prompt in prompts if prompt.key not in texts]:
        notes.append(
            f"Warning: {len(missing)} prompts have no response and are left out: key "
            f"{', '.join(missing)}."
        )
    if reworded:
        notes.append(
            f"The file has another wording of key {', '.join(reworded)}; its response is scored by "
            "the instructions of the present wording."
        )
    return texts, notes
