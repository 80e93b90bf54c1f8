"""Structured output over HTTP with the real OpenAI client; the model knows nothing."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from fd_dsa.commands import extra_command
from tests.engine.byte_model import TOKENIZER, make_engine
from tests.engine.test_grammar import SCHEMA
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running
from tests.serve.test_errors import complete, error_of

MESSAGES: Any = [{"role": "user", "content": "a thing"}]


@pytest.fixture(scope="module")
def bytes_live() -> Iterator[Live]:
    """A server over a fake model whose tokens are bytes."""
    with running(threaded(make_engine())) as live:
        yield live


def finished(live: Live, **fields: Any) -> list[str]:
    """Texts of answers that came to their end, of some seeds."""
    texts = []
    for seed in range(6):
        body = {"messages": MESSAGES, "max_tokens": 400, "seed": seed, **fields}
        answer = live.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        texts += [c["message"]["content"] for c in choices if c["finish_reason"] == "stop"]
    assert len(texts) > 2
    return texts


class Thing(BaseModel):
    """Answer that `parse` is to return."""

    kind: Literal["small", "large"]
    weight: int = Field(ge=0, le=9)
    parts: list[Literal["x", "y"]] = Field(max_length=3)


def test_parse_gives_a_pydantic_object(bytes_live: Live) -> None:
    found = []
    for seed in range(8):
        try:
            answer = bytes_live.client.beta.chat.completions.parse(
                model="demo",
                messages=MESSAGES,
                max_tokens=400,
                seed=seed,
                response_format=Thing,
                extra_body={"min_p": 0.001},
            )
        except openai.LengthFinishReasonError:
            continue
        found.append(answer.choices[0].message.parsed)
    assert len(found) > 2
    assert all(isinstance(thing, Thing) for thing in found)


def test_every_field_that_gives_a_form(bytes_live: Live) -> None:
    for text in finished(bytes_live, response_format={"type": "json_object"}):
        assert isinstance(json.loads(text), dict)
    assert finished(bytes_live, guided_json_object=True)[0].lstrip().startswith("{")
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        for fields in ({"guided_json": schema}, {"structured_outputs": {"json": schema}}):
            for text in finished(bytes_live, **fields):
                jsonschema.validate(json.loads(text), SCHEMA)
    for fields in ({"guided_regex": "[ab]{3}!"}, {"structured_outputs": {"regex": "[ab]{3}!"}}):
        assert all(re.fullmatch("[ab]{3}!", text) for text in finished(bytes_live, **fields))
    for fields in (
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"choice": ["yes", "no"], "regex": None}},
    ):
        assert {"yes", "no"} == set(finished(bytes_live, **fields, n=3))
    for grammar in ('start: "<" /[0-9]/ ">"', 'root ::= "<" [0-9] ">"'):
        for text in finished(bytes_live, guided_grammar=grammar):
            assert re.fullmatch("<[0-9]>", text)


def test_a_form_begins_behind_the_reasoning() -> None:
    (think_end,) = TOKENIZER.encode("</think>", add_special_tokens=False)
    body = {
        "messages": [{"role": "user", "content": "a<think>"}],
        "max_tokens": 200,
        "logit_bias": {str(think_end): 3},
        "n": 8,
        "seed": 1,
    }
    # the message opens the reasoning
    flags = {"reasoning_parser": "deepseek_v3", "allow_special_tokens_in_text": True}
    with running(threaded(make_engine()), **flags) as live:
        for form in ({"guided_regex": "[ab]{3}"}, {"guided_choice": ["aab", "bba"]}):
            answer = live.http.post("/v1/chat/completions", json={**body, **form})
            found = [c for c in answer.json()["choices"] if c["finish_reason"] == "stop"]
            assert len(found) > 4
            assert any(len(choice["message"]["reasoning_content"]) > 5 for choice in found)
            for choice in found:
                assert re.fullmatch("[ab]{3}", choice["message"]["content"])


def test_text_and_null_ask_for_no_form(bytes_live: Live) -> None:
    plain = complete(bytes_live, seed=1, max_tokens=9).json()["choices"][0]["text"]
    for fields in (
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None, "guided_json_object": False},
    ):
        answer = complete(bytes_live, seed=1, max_tokens=9, **fields).json()
        assert answer["choices"][0]["text"] == plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"guided_json": {"type": 5}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
        ({"guided_json": {"enum": ["a", {"id": 2**53 + 1}]}}, "guided_json"),
        ({"guided_json": {"const": 10**22 + 1}}, "guided_json"),
        ({"guided_json": '{"const": 1e999}'}, "guided_json"),
        ({"guided_json": {"enum": ["a", ["b\x00"]]}}, "guided_json"),
        ({"guided_json": {"const": "\x7f"}}, "guided_json"),
        ({"guided_json": r'{"const": "\ud800"}'}, "guided_json"),
        ({"guided_json": {"type": "integer", "minimum": 10**400}}, "guided_json"),
        ({"guided_json": {"items": {"maximum": -(2**60)}}}, "guided_json"),
        ({"structured_outputs": {"json": {"$ref": "http://x.org/"}}}, "structured_outputs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
        ),
    ],
)
def test_a_form_that_cannot_be_used_is_a_bad_request(
    bytes_live: Live, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        error = error_of(complete(bytes_live, **fields, stream=stream), 400)
        assert error["param"] == param
        assert error["message"].startswith(f"{param} cannot be used: ")
    assert complete(bytes_live).status_code == 200


def test_a_refused_number_is_named_with_its_keyword(bytes_live: Live) -> None:
    """A double would make another number of it, such as ...768 of ...789."""
    schema = {"properties": {"const": {"enum": [1, 1234567890123456789]}}}
    error = error_of(complete(bytes_live, guided_json=schema), 400)
    assert error["message"] == (
        "guided_json cannot be used: enum: 1234567890123456789 is beyond the integers that "
        "doubles hold"
    )


@pytest.mark.parametrize(
    "schema",
    [
        # the bounds of int64 and uint64, as generators of schemas write them
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        {"type": "integer", "minimum": 2**53 - 1, "maximum": 2**53 + 1},
        {"type": "number", "minimum": -1e300, "maximum": 1e300},
        {"enum": [2**53, -(2**53), 1.5, {"minimum": 2**53}]},
        {"type": "integer", "minimum": 7, "maximum": 7, "default": 2**60 + 1},
        {"const": "\b\t\n\f\r\x80\u2028", "default": "\x00"},
        # without effect, as generators of schemas write them
        {"items": {"const": 7}, "maxItems": 1, "type": "array", "uniqueItems": False},
        {"const": 7, "dependentRequired": {}, "unevaluatedProperties": True},
    ],
)
def test_answers_keep_the_values_of_a_schema(bytes_live: Live, schema: dict[str, Any]) -> None:
    for text in finished(bytes_live, guided_json=schema):
        jsonschema.validate(json.loads(text), schema)


def test_without_the_library_a_form_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "fd_dsa.engine.grammar.find_spec",
        lambda name: None if name == "llguidance" else find_spec(name),
    )
    # of its own: the other server has compiled the form before
    with running(threaded(make_engine())) as live:
        error = error_of(complete(live, response_format={"type": "json_object"}), 400)
        assert error["param"] == "response_format"
        assert error["message"].endswith(f"; {extra_command('structured')}")
        assert complete(live).status_code == 200


def test_a_form_that_the_bans_exclude_is_a_bad_request(bytes_live: Live) -> None:
    fields = {"guided_choice": ["no"], "bad_words": ["n"]}
    assert (
        "so guided_choice cannot be followed"
        in error_of(complete(bytes_live, **fields), 400)["message"]
    )
