"""Files of IFEval: prompts in the form of the official set, and official responses.

A prompt file holds one JSON object a line:

    {"key": 1000, "prompt": "...", "instruction_id_list": ["punctuation:no_comma", ...],
     "kwargs": [{}, ...]}

`kwargs` has one object of arguments for each instruction, the same ones as in the official set. The
checkers would replace a missing, null, empty or negative one by a random requirement that no answer
has seen.

A response file, as google-research/instruction_following_eval reads it, holds `{"prompt": ...,
"response": ...}` a line, in any order. A response belongs to the prompt with the same text. The
benchmark's own files have one prompt in an older wording. So a remaining response goes to a prompt
without one if their texts are nearly the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

from fd_dsa.accuracy.scores import first_fault
from fd_dsa.client.questions import Answer, Question
from fd_dsa.command_line.inputs import MAX_BYTES, read_bounded
from fd_dsa.errors import ConfigError, shorten, shorten_text

OFFICIAL = Path(__file__).with_name("data") / "ifeval_prompts.jsonl"
"""The prompts of google-research/google-research, unchanged.

The NOTICE has their origin.
"""

MAX_TOKENS = 1280
"""Longest answer, same as in lm-eval's task.

Some prompts ask for up to 1,200 words and fail with less.
"""

# the older wording and the present one have a similarity of 0.992
_SAME_PROMPT = 0.97
_Text = Annotated[str, StringConstraints(pattern=r"\S")]


class _PromptLine(BaseModel):
    key: int | _Text
    prompt: _Text
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]


class _ResponseLine(BaseModel):
    prompt: str
    response: str


_Line = TypeVar("_Line", bound=BaseModel)


def read_prompts(path: Path | str | None = None) -> list[Question]:
    """Read the prompts of a file, in order. None = the official prompts.

    Each is one user message without a system prompt, as IFEval asks it. Its metadata are the
    `instruction_ids` that its answer is checked against, and their `kwargs`.
    """
    if path is None:
        return list(_official().values())
    prompts: dict[str, Question] = {}
    for place, prompt in _prompts(path):
        if prompt.key in prompts:
            raise ConfigError(f"{place}: key: got {prompt.key!r} twice; keys must be unique")
        _check_rules(**prompt.metadata, place=place)
        prompts[prompt.key] = prompt
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; at least one is needed")
    return list(prompts.values())


def _lines(path: Path | str, kind: type[_Line]) -> Iterator[tuple[str, _Line]]:
    """Yield place and content of every line that is not empty."""
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{shorten_text(str(path))}: cannot be read ({error.strerror}); a JSONL file is needed"
        ) from None
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", kind.model_validate_json(line, strict=True)
            except ValidationError as error:
                raise ConfigError(f"{path}:{number}: {first_fault(error)}") from None


def _prompts(path: Path | str) -> Iterator[tuple[str, Question]]:
    """Yield place and prompt of every line."""
    for place, line in _lines(path, _PromptLine):
        messages = ({"role": "user", "content": line.prompt},)
        rules = {
            "instruction_ids": line.instruction_id_list,
            "kwargs": list(map(_given, line.kwargs)),
        }
        yield place, Question(str(line.key), messages, MAX_TOKENS, rules)


def _given(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that count: not null, empty or negative."""

    def counts(value: Any) -> bool:
        return value >= 0 if isinstance(value, int) else bool(value)

    return {name: value for name, value in kwargs.items() if counts(value)}


def _check_rules(instruction_ids: list[str], kwargs: list[dict[str, Any]], place: str) -> None:
    """Check that instructions are known and have the arguments of the official set."""
    if not instruction_ids or len(kwargs) != len(instruction_ids):
        raise ConfigError(
            f"{place}: kwargs: got {len(kwargs)} objects for {len(instruction_ids)} instructions; "
            "one for each is needed"
        )
    for name, given in zip(instruction_ids, kwargs, strict=True):
        if name not in arguments():
            known = ", ".join(arguments())
            raise ConfigError(f"{place}: instruction_id_list: got {name!r}; allowed are {known}")
        if {key: type(value) for key, value in given.items()} != arguments()[name]:
            needed = ", ".join(
                f"{key} ({kind.__name__})" for key, kind in arguments()[name].items()
            )
            raise ConfigError(
                f"{place}: kwargs of {name}: got {shorten(given)}; must be {needed or 'empty'}"
            )


@cache
def _official() -> Mapping[str, Question]:
    """Return the official prompts by key, in order."""
    return {prompt.key: prompt for _, prompt in _prompts(OFFICIAL)}


@cache
def arguments() -> Mapping[str, Mapping[str, type]]:
    """Return instruction -> its arguments with their types, taken from the official set."""
    found: dict[str, dict[str, type]] = {}
    for prompt in _official().values():
        rules = prompt.metadata
        for name, given in zip(rules["instruction_ids"], rules["kwargs"], strict=True):
            found[name] = {key: type(value) for key, value in given.items()}
    return dict(sorted(found.items()))


def set_warning(prompts: Sequence[Question | Answer]) -> str | None:
    """Return a warning if scores of these prompts are not comparable with others.

    The official set returns None.
    """
    official = _official()
    whole = {key: (prompt.messages, prompt.metadata) for key, prompt in official.items()}
    if any(whole.get(prompt.key) != (prompt.messages, prompt.metadata) for prompt in prompts):
        kind = f"not IFEval's official set: {_counts(prompts)}"
    elif len(prompts) < len(official):
        kind = f"partial set: {_counts(prompts)}, of {_counts(list(official.values()))}"
    else:
        return None
    return f"{kind}; comparable only with runs on the same prompts"


def _counts(prompts: Sequence[Question | Answer]) -> str:
    rules = sum(len(prompt.metadata["instruction_ids"]) for prompt in prompts)
    return f"{len(prompts)} prompts with {rules} instructions"


def read_responses(path: Path, prompts: Sequence[Question]) -> tuple[list[Answer], list[str]]:
    """Return the responses to these prompts, and notes for readers of the scores."""
    responses: dict[str, str] = {}
    places: dict[str, str] = {}
    for place, line in _lines(path, _ResponseLine):
        if line.prompt in places:
            raise ConfigError(
                f"{place}: prompt: {shorten(line.prompt)} is also the prompt of "
                f"{places[line.prompt]}; each prompt has one response"
            )
        responses[line.prompt], places[line.prompt] = line.response, place
    if not responses:
        raise ConfigError(f"{path}: holds no response; at least one is needed")
    known = {prompt.text: prompt for prompt in prompts}
    notes = []
    for text in [text for text in responses if text not in known]:
        free = [other for other in known if other not in responses]
        near = get_close_matches(text, free, n=1, cutoff=_SAME_PROMPT)
        if not near:
            raise ConfigError(
                f"{places[text]}: prompt: {shorten(text)} is not one of the {len(prompts)} "
                "prompts; --prompts names the file that it is from"
            )
        responses[near[0]] = responses.pop(text)
        notes.append(
            f"The file has another wording of key {known[near[0]].key}; its response is scored by "
            "the instructions of the present wording."
        )
    if missing := [prompt.key for text, prompt in known.items() if text not in responses]:
        notes.append(
            f"Warning: {len(missing)} prompts have no response and are left out: key "
            f"{', '.join(missing)}."
        )
    answers = [
        Answer(prompt.key, responses[text], messages=prompt.messages, metadata=prompt.metadata)
        for text, prompt in known.items()
        if text in responses
    ]
    return answers, notes
