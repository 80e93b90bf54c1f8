"""Calls and forms over HTTP, from a model that knows nothing, with the flags of real tokenizers."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jsonschema
import pytest

from fd_dsa.chat.parser import THINK_END
from tests.chat.test_grammar_walks import BOUNDED
from tests.engine import fakes
from tests.engine.published import KINDS
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running
from tests.serve.test_tool_calls import RENDERERS

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in BOUNDED.items()
]
# a tokenizer, and the format that its model writes
PAIRS = [
    ("glm", "glm47"),
    ("special", "deepseek_v32"),
    ("not special", "deepseek_v31"),
    ("deepseek", "deepseek_v4"),
]


@functools.cache
def tokenizer_of(kind: str) -> Any:
    """One of the tokenizers, which takes a second to read."""
    return KINDS[kind]()


@contextmanager
def serving(kind: str, tool_format: str) -> Iterator[Live]:
    """A server whose model draws any token that may come."""
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_renderer = RENDERERS[tool_format]
    engine = fakes.make_engine(
        num_blocks=2048,
        max_model_len=4096,
        max_num_batched_tokens=512,
        vocab_size=tokenizer.highest_token_id + 1,
        tokenizer=tokenizer,
    )
    with running(threaded(engine)) as live:
        yield live


def body_of(kind: str, **fields: Any) -> dict[str, Any]:
    """A request for some answers whose reasoning ends soon."""
    tokenizer = tokenizer_of(kind)
    (end,) = tokenizer.encode(THINK_END, add_special_tokens=False)
    # about every fifth token ends the reasoning
    likely = math.log(tokenizer.highest_token_id) - 1
    thinking = {"thinking": True, "enable_thinking": True}
    return {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": TOOLS,
        "chat_template_kwargs": thinking,
        "logit_bias": {str(token_id): likely for token_id in (end, fakes.EOS)},
        "max_tokens": 1500,
        "n": 2,
        "seed": 3,
        **fields,
    }


def ask(live: Live, kind: str, **fields: Any) -> list[dict[str, Any]]:
    """Choices of the answers to `body_of`."""
    body = body_of(kind, **fields)
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def check_calls(choice: dict[str, Any], names: tuple[str, ...] = tuple(BOUNDED)) -> None:
    """The choice has valid calls and no content."""
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert not message["content"]
    for call in message["tool_calls"]:
        assert call["function"]["name"] in names
        jsonschema.validate(
            json.loads(call["function"]["arguments"]), BOUNDED[call["function"]["name"]]
        )


SHAPE = {
    "type": "object",
    "properties": {"shape": {"enum": ["round", "<tool_call>"]}},
    "required": ["shape"],
    "additionalProperties": False,
}


def _is_shape(content: str) -> bool:
    jsonschema.validate(json.loads(content), SHAPE)
    return True


FORMS: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SHAPE}}},
        _is_shape,
    ),
    ({"guided_regex": "[ab]{2}[^ab]{1,3}"}, re.compile("[ab]{2}[^ab]{1,3}").fullmatch),
    ({"guided_choice": ["<b> yes", "no"]}, ["<b> yes", "no"].__contains__),
    ({"guided_grammar": 'start: "(" start ")" | /[xy]/'}, re.compile(r"\(*[xy]\)*").fullmatch),
]


@pytest.mark.parametrize(
    ("kind", "tool_format"),
    [("glm", "glm47"), ("special", "deepseek_v32")],
)
def test_with_auto_an_answer_is_a_call_or_has_the_form(kind: str, tool_format: str) -> None:
    with serving(kind, tool_format) as live:
        for form, has_form in FORMS:
            calls = 0
            choices = ask(live, kind, n=16, **form)
            for choice in choices:
                if choice["message"].get("tool_calls"):
                    check_calls(choice)
                    calls += 1
                else:
                    assert choice["finish_reason"] == "stop"
                    assert has_form(choice["message"]["content"])
            assert 0 < calls < len(choices), form
            for choice in ask(live, kind, parallel_tool_calls=False, n=2, **form):
                assert len(choice["message"].get("tool_calls") or []) <= 1


def test_a_refusal_names_the_form_or_the_tools() -> None:
    wrong = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": wrong}}
    with serving("not special", "deepseek_v31") as live:
        for fields, param in (
            ({"tools": [tool], "guided_regex": "a"}, "tools"),
            ({"tools": TOOLS, "guided_regex": "("}, "guided_regex"),
            ({"tools": [*TOOLS, tool], "tool_choice": "required"}, "tools"),
        ):
            body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
            answer = live.http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param
            name = "tools: a call of 'f'" if param == "tools" else param
            assert answer.json()["error"]["message"].startswith(f"{name} cannot be used: ")
        # without a form, calls are free
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "max_tokens": 3}
        assert live.http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(("kind", "tool_format"), PAIRS)
def test_a_forced_call_is_answered_with_a_call(kind: str, tool_format: str) -> None:
    named = {"type": "function", "function": {"name": "stop"}}
    with serving(kind, tool_format) as live:
        # one answer in five has no reasoning
        choices = ask(live, kind, tool_choice="required", n=5)
        assert any("reasoning_content" in choice["message"] for choice in choices)
        for choice in choices:
            check_calls(choice)
        for choice in ask(live, kind, tool_choice=named, n=1):
            check_calls(choice, ("stop",))
            assert len(choice["message"]["tool_calls"]) == 1


# schemas that describe no argument
EMPTY: dict[str, dict[str, Any]] = {
    "none": {},
    "null": {"parameters": None},
    "anything": {"parameters": {}},
    "object": {"parameters": {"type": "object", "title": "F"}},
    "list": {"parameters": {"type": "object", "properties": {}, "required": []}},
}


@pytest.mark.parametrize(("kind", "tool_format"), PAIRS)
def test_a_forced_call_without_parameters_has_no_arguments(kind: str, tool_format: str) -> None:
    """The OpenAI API reads a function without parameters as one without arguments."""
    tools = [{"type": "function", "function": {"name": k, **of}} for k, of in EMPTY.items()]
    with serving(kind, tool_format) as live:
        for choice in ("required", *({"type": "function", "function": {"name": k}} for k in EMPTY)):
            for answer in ask(live, kind, tools=tools, tool_choice=choice):
                assert answer["finish_reason"] == "tool_calls"
                for call in answer["message"]["tool_calls"]:
                    assert call["function"]["name"] in EMPTY
                    assert json.loads(call["function"]["arguments"]) == {}


def test_an_open_schema_of_a_forced_call_allows_arguments() -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with serving("special", "deepseek_v32") as live:
        for answer in ask(live, "special", tools=[tool], tool_choice="required"):
            assert answer["finish_reason"] == "tool_calls"
            for call in answer["message"]["tool_calls"]:
                jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
