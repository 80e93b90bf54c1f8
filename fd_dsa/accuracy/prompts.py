"""Prompts of IFEval: the official set, which comes in the package, or a file of the same form.

A file holds one JSON object a line:

    {"key": 1000, "prompt": "...", "instruction_id_list": ["punctuation:no_comma", ...],
     "kwargs": [{}, ...]}

with one object of arguments for each instruction; arguments that are null count as left out.
Every argument of an instruction must be there: the checkers would replace a missing one by a
random requirement that no answer has ever seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from fd_dsa.accuracy.types import Question
from fd_dsa.errors import ConfigError

OFFICIAL = Path(__file__).with_name("data") / "ifeval_prompts.jsonl"
"""The prompts of google-research/google-research, unchanged; origin in the NOTICE beside it."""

_COUNT, _RELATION, _TEXT, _TEXTS = "count", "relation", "text", "texts"
_RELATIONS = ("at least", "less than")
_ALLOWED = {
    _COUNT: "a whole number of 1 or more",
    _RELATION: " or ".join(repr(relation) for relation in _RELATIONS),
    _TEXT: "a text that is not empty",
    _TEXTS: "a list of texts, none of them empty",
}

ARGUMENTS: dict[str, dict[str, str]] = {
    "change_case:capital_word_frequency": {
        "capital_frequency": _COUNT,
        "capital_relation": _RELATION,
    },
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "combination:repeat_prompt": {"prompt_to_repeat": _TEXT},
    "combination:two_responses": {},
    "detectable_content:number_placeholders": {"num_placeholders": _COUNT},
    "detectable_content:postscript": {"postscript_marker": _TEXT},
    "detectable_format:constrained_response": {},
    "detectable_format:json_format": {},
    "detectable_format:multiple_sections": {"section_spliter": _TEXT, "num_sections": _COUNT},
    "detectable_format:number_bullet_lists": {"num_bullets": _COUNT},
    "detectable_format:number_highlighted_sections": {"num_highlights": _COUNT},
    "detectable_format:title": {},
    "keywords:existence": {"keywords": _TEXTS},
    "keywords:forbidden_words": {"forbidden_words": _TEXTS},
    "keywords:frequency": {"keyword": _TEXT, "frequency": _COUNT, "relation": _RELATION},
    "keywords:letter_frequency": {
        "letter": _TEXT,
        "let_frequency": _COUNT,
        "let_relation": _RELATION,
    },
    "language:response_language": {"language": _TEXT},
    "length_constraints:nth_paragraph_first_word": {
        "first_word": _TEXT,
        "num_paragraphs": _COUNT,
        "nth_paragraph": _COUNT,
    },
    "length_constraints:number_paragraphs": {"num_paragraphs": _COUNT},
    "length_constraints:number_sentences": {"num_sentences": _COUNT, "relation": _RELATION},
    "length_constraints:number_words": {"num_words": _COUNT, "relation": _RELATION},
    "punctuation:no_comma": {},
    "startend:end_checker": {"end_phrase": _TEXT},
    "startend:quotation": {},
}
"""Instruction -> its arguments and what each holds; these 25 are all that the official set has."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and the rules that its answer is checked against.

    Attributes:
        key: unique in its file.
        text: the user's turn.
        instruction_ids: such as `punctuation:no_comma`, at least one.
        kwargs: arguments of each instruction, none of them null.
    """

    key: str
    text: str
    instruction_ids: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]

    def to_question(self, max_tokens: int) -> Question:
        """The prompt as one user turn without a system prompt, as IFEval asks it."""
        rules = {"instruction_ids": list(self.instruction_ids), "kwargs": list(self.kwargs)}
        return Question(self.key, ({"role": "user", "content": self.text},), max_tokens, rules)


def read_prompts(path: Path | str | None = None) -> list[Prompt]:
    """The prompts of a file, in its order; None reads the official ones.

    Raises:
        ConfigError: the file cannot be read, is empty or has a line that is no prompt; the message
            is one line with the file, the line's number, the field, its value and the rule.
    """
    source = OFFICIAL if path is None else Path(path)
    try:
        lines = source.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"prompts: {source} cannot be read ({error.strerror}); a JSONL file with one prompt "
            "a line is needed"
        ) from None
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = _parse(line, f"{source}:{number}")
        if prompt.key in seen:
            raise ConfigError(
                f"{source}:{number}: key: {prompt.key!r} is also the key of line "
                f"{seen[prompt.key]}; keys must be unique"
            )
        seen[prompt.key] = number
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"prompts: {source} holds no prompt; at least one is needed")
    return prompts


def set_warning(prompts: Sequence[Prompt]) -> str | None:
    """Why figures of these prompts compare with nobody else's; None for the official set."""
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
    """The official prompts by key."""
    return {prompt.key: prompt for prompt in read_prompts()}


def _parse(line: bytes, where: str) -> Prompt:
    """The prompt of one line."""
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason = str(error).split(": line ")[0]
        raise ConfigError(f"{where}: not JSON ({reason}); one JSON object a line") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: {_shown(data)} is no JSON object; one prompt a line")
    key, text = data.get("key"), data.get("prompt")
    if isinstance(key, bool) or not isinstance(key, int | str) or key == "":
        raise ConfigError(f"{where}: key: {_shown(key)}; a whole number or a text is needed")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: prompt: {_shown(text)}; {_ALLOWED[_TEXT]} is needed")
    names, arguments = data.get("instruction_id_list"), data.get("kwargs")
    if not isinstance(names, list) or not names:
        raise ConfigError(
            f"{where}: instruction_id_list: {_shown(names)}; a list of at least one instruction "
            "is needed"
        )
    if not isinstance(arguments, list) or len(arguments) != len(names):
        found = f"{len(arguments)} entries" if isinstance(arguments, list) else _shown(arguments)
        raise ConfigError(
            f"{where}: kwargs: {found} for {len(names)} instructions; one object for each is needed"
        )
    pairs = zip(names, arguments, strict=True)
    kwargs = tuple(_arguments(name, given, where) for name, given in pairs)
    return Prompt(str(key), text, tuple(names), kwargs)


def _arguments(name: Any, given: Any, where: str) -> dict[str, Any]:
    """Arguments of one instruction without those that are null, all of them checked."""
    if not isinstance(name, str) or name not in ARGUMENTS:
        known = ", ".join(ARGUMENTS)
        raise ConfigError(f"{where}: instruction_id_list: {_shown(name)}; allowed are {known}")
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: kwargs of {name}: {_shown(given)}; an object is needed")
    wanted = ARGUMENTS[name]
    kept = {key: value for key, value in given.items() if value is not None}
    unknown = [key for key in kept if key not in wanted]
    if unknown:
        allowed = ", ".join(wanted) or "none"
        raise ConfigError(f"{where}: kwargs of {name}: {_shown(unknown[0])}; allowed are {allowed}")
    for key, kind in wanted.items():
        rule = f"{_ALLOWED[kind]} is needed"
        if key not in kept:
            raise ConfigError(f"{where}: kwargs of {name}: {key} is missing; {rule}")
        if not _fits(kept[key], kind):
            found = _shown(kept[key])
            raise ConfigError(f"{where}: kwargs of {name}: {key}: {found}; {rule}")
    return kept


def _fits(value: Any, kind: str) -> bool:
    """Whether an argument holds what its checker reads."""
    if kind == _COUNT:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    if kind == _RELATION:
        return value in _RELATIONS
    if kind == _TEXT:
        return isinstance(value, str) and bool(value.strip())
    return isinstance(value, list) and bool(value) and all(_fits(one, _TEXT) for one in value)


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
