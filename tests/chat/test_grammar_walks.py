"""Forced calls and other forms, walked token by token with the flags of published tokenizers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from fd_dsa.chat.grammar import forced_calls_grammar
from fd_dsa.chat.parser import THINK_END, TOOL_FORMATS, AnswerFormat, OutputParser
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from tests.chat.recorded import SCHEMAS
from tests.chat.test_grammar import ANSWERS
from tests.engine.grammar_walks import Walks
from tests.engine.published import KINDS, MARKERS

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")

# every walk ends: no text is free
BOUNDED: dict[str, Any] = {
    "paint": {
        "type": "object",
        "properties": {
            "color": {"type": "string", "enum": ["red", "a </think> b", "grün"]},
            "coats": {"type": "integer", "minimum": 0, "maximum": 99},
            "is_wet": {"type": "boolean"},
        },
        "required": ["color", "coats"],
        "additionalProperties": False,
    },
    "stop": {"type": "object", "properties": {}, "additionalProperties": False},
}
FORMATS = sorted({known.name for known in TOOL_FORMATS.values()})
THOUGHTS = "They say <think> or </thin k>; I paint</"


@functools.cache
def walks_of(kind: str) -> Walks:
    """Walks with one of the tokenizers, which takes a second to read."""
    return Walks(KINDS[kind]())


def in_pieces(walks: Walks, text: str) -> list[int]:
    """Tokens of a text, each of one character, so that no marker is one token."""
    return [i for char in text for i in walks.tokenizer.encode(char, add_special_tokens=False)]


# texts before the answer, by how the answer begins
BEFORE = {"none": "", "opened": f"{THOUGHTS}{THINK_END}", "own": f"<think>{THOUGHTS}{THINK_END}"}


def answer_of(tool_format: str, begins: str, schemas: dict[str, Any]) -> AnswerFormat:
    """The format of an answer; "none": of a model that never reasons."""
    known = next(known for known in TOOL_FORMATS.values() if known.name == tool_format)
    return AnswerFormat(begins != "none", begins == "opened", known, schemas)


def fields_of(walks: Walks, answer: AnswerFormat) -> dict[str, Any]:
    """Parameters of a request, as the server sets them; an argument contains </think>."""
    special = walks.tokenizer.special_ids_of((*answer.markers, THINK_END))
    return {
        "kept_special_token_ids": frozenset(special.values()),
        "reasoning": Reasoning.of(answer),
    }


def in_pairs(answers: Sequence[Any]) -> list[tuple[str, Any, str]]:
    """List tokenizers and answers, each answer with each tokenizer and with each beginning."""
    begins = list(BEFORE)
    return [
        (kind, answer, begins[(number + place) % len(begins)])
        for number, kind in enumerate(KINDS)
        for place, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("kind", "tool_format", "begins"),
    in_pairs(FORMATS),
)
def test_any_allowed_tokens_are_calls(kind: str, tool_format: str, begins: str) -> None:
    """Random tokens under the masks are calls, and so is the tokenizer's way to write them."""
    walks, rng = walks_of(kind), np.random.default_rng(len(begins))
    answer, before = answer_of(tool_format, begins, BOUNDED), BEFORE[begins]
    kept = fields_of(walks, answer)
    grammar = forced_calls_grammar(tool_format, BOUNDED, several=True)
    form = StructuredOutputsParams(grammar=grammar)
    for _ in range(2):
        matcher = walks.begin(form, **kept)
        # markers as one token if they have one, or letter by letter
        in_letters = functools.partial(in_pieces, walks)
        in_tokens = functools.partial(walks.tokenizer.encode, add_special_tokens=False)
        token_ids = (in_letters if rng.random() < 0.5 else in_tokens)(before)
        assert walks.take(matcher, token_ids) == len(token_ids)
        token_ids += walks.wander(matcher, rng, 2000)
        assert matcher.is_finished and matcher.error is None
        if token_ids[-1] == walks.eos:
            token_ids.pop()
        text = walks.tokenizer.decode(token_ids, kept=kept["kept_special_token_ids"])
        message = OutputParser(answer).parse(text)
        assert message.content == "" and message.tool_calls
        assert message.reasoning == (THOUGHTS if before else "")
        for call in message.tool_calls:
            jsonschema.validate(json.loads(call.arguments), BOUNDED[call.name])
        assert walks.accepts(form, text, **kept) == (True, True)


@pytest.mark.parametrize(
    ("kind", "tool_format", "calls", "begins"),
    [(kind, *answer, begins) for kind, answer, begins in in_pairs(ANSWERS)],
)
def test_calls_as_models_write_them(kind: str, tool_format: str, calls: str, begins: str) -> None:
    """The tokenizer's tokens of a whole answer, and those of its letters."""
    walks, answer = walks_of(kind), answer_of(tool_format, begins, SCHEMAS)
    grammar = forced_calls_grammar(tool_format, SCHEMAS, several=True)
    form = StructuredOutputsParams(grammar=grammar)
    fields = fields_of(walks, answer)
    text = BEFORE[begins] + calls
    assert walks.accepts(form, text, **fields) == (True, True)
    if begins == "own":
        # a model that may reason does not have to
        assert walks.accepts(form, calls, **fields) == (True, True)
    pieces, matcher = in_pieces(walks, text), walks.begin(form, **fields)
    assert walks.take(matcher, pieces) == len(pieces) and walks.may_end(matcher)


TEXT = "a </think> <｜tool▁sep｜><arg_key>"
FORMS = {
    "choice": StructuredOutputsParams(choice=["no", TEXT]),
    "regex": StructuredOutputsParams(regex=r"[^!]*</think> <｜tool▁sep｜><arg_key>!?"),
    "grammar": StructuredOutputsParams(
        grammar=f'start: A " " {json.dumps(TEXT[11:], ensure_ascii=False)}\nA: /a <\\/think>/'
    ),
    "enum": StructuredOutputsParams(json={"enum": [TEXT, 5]}),
    "text in JSON": StructuredOutputsParams(json={"type": "string", "maxLength": 40}),
}


@pytest.mark.parametrize("after", [None, THINK_END])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_forms_whose_texts_contain_markers(kind: str, form: str, after: str | None) -> None:
    """The tokens are the marker's own if the text shows them, or those of its letters."""
    walks = walks_of(kind)
    asked, reasoning = FORMS[form], None if after is None else Reasoning("", after)
    text = f'"{TEXT}"' if FORMS[form].json is not None else TEXT
    before = "" if after is None else f"So {THINK_END}"
    special = walks.tokenizer.special_ids_of(MARKERS)
    shown = {"kept_special_token_ids": frozenset(special.values())}
    for fields in (shown, {"skip_special_tokens": False}):
        accepted = walks.accepts(asked, before + text, reasoning=reasoning, **fields)
        assert accepted == (True, True)
    pieces = in_pieces(walks, before + text)
    matcher = walks.begin(asked, reasoning=reasoning)
    assert walks.take(matcher, pieces) == len(pieces) and walks.may_end(matcher)
    if special and after is None:
        # the text would lose the tokens
        assert not walks.accepts(asked, text)[0]
