"""Tools, reasoning and templates over HTTP; the engine says what models have been recorded to."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from fd_dsa.chat.deepseek_encoding import DeepseekV4Encoding, DeepseekV32Encoding
from fd_dsa.chat.template import ChatTemplate
from fd_dsa.engine.reasoning import Reasoning
from tests.chat import templates
from tests.chat.recorded import RECORDED, TOOLS, Recorded
from tests.chat.v4_oracle import PLACEHOLDERS
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine

HI = [{"role": "user", "content": "Hi"}]
RENDERERS: dict[str, ChatTemplate] = {
    "deepseek_v31": ChatTemplate(templates.V31, {"bos_token": "<｜begin▁of▁sentence｜>"}),
    "deepseek_v32": DeepseekV32Encoding("TOOLS\n{tool_schemas}\n"),
    "deepseek_v4": DeepseekV4Encoding(PLACEHOLDERS),
    "glm47": ChatTemplate(templates.GLM, {}),
    "glm45": ChatTemplate(templates.GLM, {}),
}
V32 = RECORDED["v32 thinking, calls"]


def engine_of(recorded: Recorded, **kwargs: Any) -> FakeEngine:
    """An engine that generates what was recorded, with the chat template of its model."""
    renderer = RENDERERS[recorded.tool_format]
    return FakeEngine(words=recorded.tokens, renderer=renderer, max_model_len=4096, **kwargs)


def asked(recorded: Recorded, **fields: Any) -> dict[str, Any]:
    """A request for that answer."""
    thinking = {"chat_template_kwargs": {"thinking": recorded.in_reasoning}}
    return {"model": "demo", "messages": HI, "tools": TOOLS, "extra_body": thinking, **fields}


def prompt_of(live: Live) -> str:
    """The text of the latest prompt."""
    prompt, _ = list(live.engine.requests.values())[-1]
    return bytes(prompt).decode()


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_whole_and_streamed_answers(recorded: Recorded) -> None:
    expected = recorded.message
    calls = [(call.name, call.arguments) for call in expected.tool_calls]
    reason = "tool_calls" if calls else "stop"
    with running(engine_of(recorded)) as live:
        choice = live.client.chat.completions.create(**asked(recorded)).choices[0]
        assert choice.message.content == (expected.content or None)
        assert getattr(choice.message, "reasoning_content", "") == expected.reasoning
        found = choice.message.tool_calls or []
        assert [(c.function.name, c.function.arguments) for c in found] == calls
        assert len({call.id for call in found}) == len(calls)
        assert all(set(call.model_dump()) == {"id", "type", "function"} for call in found)
        assert choice.finish_reason == reason

        # the helper of the openai package, which agents use, joins the chunks
        with live.client.chat.completions.stream(**asked(recorded)) as stream:
            chunks = [event.chunk for event in stream if event.type == "chunk"]
            message = stream.get_final_completion().choices[0].message
        assert (message.content or "") == expected.content
        parts = [chunk.choices[0] for chunk in chunks]
        thoughts = [getattr(part.delta, "reasoning_content", None) or "" for part in parts]
        assert "".join(thoughts) == expected.reasoning
        joined = message.tool_calls or []
        assert [(c.function.name, c.function.arguments) for c in joined] == calls
        # the first piece of each call has its id and type
        starts = [c for part in parts for c in part.delta.tool_calls or [] if c.id is not None]
        assert [(c.index, c.type) for c in starts] == [(i, "function") for i in range(len(calls))]
        reasons = [part.finish_reason for part in parts]
        assert reasons == [None] * (len(reasons) - 1) + [reason]


@pytest.mark.parametrize(
    ("recorded", "ending"),
    [
        (
            V32,
            "\n\n<function_results>\n<result>get_weather</result>\n<result>now</result>\n"
            "</function_results>\n\n<think>",
        ),
        (
            RECORDED["v4 thinking, calls"],
            "<｜User｜><tool_result>get_weather</tool_result>\n\n<tool_result>now</tool_result>"
            "<｜Assistant｜><think>",
        ),
    ],
    ids=["v32", "v4"],
)
def test_a_conversation_with_tools_goes_round(recorded: Recorded, ending: str) -> None:
    """The answer, sent back as the client got it, renders to what the model had written."""
    with running(engine_of(recorded)) as live:
        answer = live.client.chat.completions.create(**asked(recorded)).choices[0].message
        first = prompt_of(live)
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": call.function.name}
            for call in answer.tool_calls or []
        ]
        history = [*HI, answer.model_dump(exclude_none=True), *reversed(results)]
        live.client.chat.completions.create(**asked(recorded, messages=history))
        second = prompt_of(live)
        dumped = answer.model_dump(exclude_none=True)
        # other names and forms that clients send the same in
        dumped["reasoning"] = dumped.pop("reasoning_content")
        for made in dumped["tool_calls"]:
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
        live.client.chat.completions.create(
            **asked(recorded, messages=[HI[0], dumped, *reversed(results)])
        )
        assert prompt_of(live) == second
    assert second.startswith(first + recorded.text)
    assert second.endswith(ending)


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_an_answer_with_one_call_ends_after_it(recorded: Recorded) -> None:
    n, calls = 2, recorded.message.tool_calls
    # more than a cut answer takes, and endless: only the server can end it
    fields = asked(
        recorded,
        parallel_tool_calls=False,
        n=n,
        extra_body={
            "chat_template_kwargs": {"thinking": recorded.in_reasoning},
            "return_token_ids": True,
        },
    )
    with running(engine_of(recorded)) as live:
        whole = live.client.chat.completions.create(**fields)
        for choice in whole.choices:
            found = choice.message.tool_calls or []
            assert [(c.function.name, c.function.arguments) for c in found] == [
                (c.name, c.arguments) for c in calls[:1]
            ]
            assert choice.finish_reason == ("tool_calls" if calls else "stop")
        usage = whole.usage
        assert usage is not None
        assert usage.completion_tokens == sum(len(c.token_ids) for c in whole.choices)
        is_cut = bool(calls)
        assert (usage.completion_tokens < n * len(recorded.tokens)) is is_cut
        assert {index for _, index in live.engine.finished} == set(range(n) if is_cut else ())
        chunks = list(live.client.chat.completions.create(**fields, stream=True))
        for index in range(n):
            parts = [c.choices[0] for c in chunks if c.choices[0].index == index]
            deltas = [call for part in parts for call in part.delta.tool_calls or []]
            assert "".join(d.function.arguments for d in deltas) == "".join(
                call.arguments for call in calls[:1]
            )
            tokens = [t for part in parts for t in getattr(part, "token_ids", [])]
            assert tokens == whole.choices[index].token_ids
            assert parts[-1].finish_reason == whole.choices[index].finish_reason


def test_without_tools_or_with_choice_none_calls_are_text() -> None:
    with running(engine_of(V32)) as live:
        for fields in ({"tools": openai.NOT_GIVEN}, {"tools": []}, {"tool_choice": "none"}):
            choice = live.client.chat.completions.create(**asked(V32, **fields)).choices[0]
            assert choice.message.tool_calls is None
            assert choice.message.content == V32.text.partition("</think>")[2]
            assert choice.finish_reason == "stop"
            assert "TOOLS" not in prompt_of(live)
        live.client.chat.completions.create(**asked(V32, tool_choice="auto"))
        assert "TOOLS" in prompt_of(live)


def test_an_answer_cut_off_inside_of_a_call() -> None:
    with running(engine_of(V32)) as live:
        fields = asked(V32, max_tokens=len(V32.tokens) - 25)
        choice = live.client.chat.completions.create(**fields).choices[0]
        assert choice.finish_reason == "length"
        (call,) = choice.message.tool_calls or []
        assert V32.message.tool_calls[0].arguments.startswith(call.function.arguments)


def test_special_markers_are_kept_for_the_parser_alone() -> None:
    special = {"｜DSML｜": 7, "</think>": 8, "<｜User｜>": 9}
    engine = engine_of(V32, special_ids=special)
    with running(engine) as live:
        live.client.chat.completions.create(**asked(V32))
        live.client.chat.completions.create(**asked(V32, tools=[]))
        live.client.completions.create(model="demo", prompt="x")
    kept = [params.kept_special_token_ids for _, params in engine.requests.values()]
    assert kept == [{7, 8}, {8}, set()]


def test_parsers_can_be_named_and_switched_off() -> None:
    with running(engine_of(V32), tool_call_parser="none", reasoning_parser="none") as live:
        message = live.client.chat.completions.create(**asked(V32, tools=[])).choices[0].message
        assert message.content == V32.text
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser none") as caught:
            live.client.chat.completions.create(**asked(V32))
        assert caught.value.param == "tools"
    glm = RECORDED["glm thinking, calls"]
    with running(
        FakeEngine(words=("<think>", *glm.tokens)),
        tool_call_parser="glm45",
        reasoning_parser="glm45",
    ) as live:
        message = live.client.chat.completions.create(**asked(glm)).choices[0].message
        assert len(message.tool_calls or []) == 2
        assert message.reasoning_content == "Two calls."


def test_the_last_message_goes_on() -> None:
    text = {"role": "assistant", "content": "I lo"}
    thought = {"role": "assistant", "reasoning_content": "Two ca"}
    with running(engine_of(V32)) as live:
        body = {"continue_final_message": True, "add_generation_prompt": False}

        def answer(message: dict[str, Any], thinking: bool) -> Any:
            extra = {**body, "chat_template_kwargs": {"thinking": thinking}}
            return (
                live.client.chat.completions.create(
                    model="demo", messages=[*HI, message], extra_body=extra
                )
                .choices[0]
                .message
            )

        assert answer(text, False).content == V32.text
        assert prompt_of(live).endswith("</think>I lo")
        assert answer(thought, True).reasoning_content == "Two calls <."
        assert prompt_of(live).endswith("<think>Two ca")


def tool(**function: Any) -> dict[str, Any]:
    """A tool with these fields."""
    return {"type": "function", "function": function}


def call(arguments: Any) -> dict[str, Any]:
    """A message that calls f."""
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]}


def allowed(mode: Any, *names: Any) -> dict[str, Any]:
    """A choice of some tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"tools": [{}]}, "tools[0].type", "is missing"),
        ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0].type", "'function'"),
        ({"tools": [tool()]}, "tools[0].function.name", "is missing"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", 'got "a b"; allowed'),
        ({"tools": [tool(name="")]}, "tools[0].function.name", "allowed is a name"),
        ({"tools": [tool(name="f"), tool(name="f")]}, "tools[1].function.name", "a second time"),
        ({"tools": [tool(name="f", parameters=[])]}, "tools[0].function.parameters", "an object"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "none, auto, required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "allowed are"),
        (
            {"tools": TOOLS, "tool_choice": tool(name="f")},
            "tool_choice",
            'got the tool "f"; allowed are get_weather, now',
        ),
        ({"tool_choice": "required"}, "tools", "no tools"),
        *(
            ({"tools": TOOLS, "tool_choice": allowed(*of)}, f"tool_choice{path}", text)
            for of, path, text in (
                (("none", "now"), "", 'got the mode "none" of allowed_tools; allowed are auto'),
                ((None, "now"), "", "got the mode null"),
                (("auto", "now", "f"), ".allowed_tools.tools", 'got "f", which is not in tools'),
                (("auto", 5), "", "as entry 0 of allowed_tools"),
                (("auto", *["now"] * 1025), "", "at most 1024"),
            )
        ),
        ({"tools": TOOLS, "tool_choice": allowed("required")}, "tools", "no tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "allowed are"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
            "tool_choice",
            "a mode and a list of tools",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "not a variable"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "not a variable"),
        ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs", "true or false"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "either",
        ),
        ({"continue_final_message": True}, "messages", "is of role"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'none', 'minimal', 'low'"),
        ({"messages": [*HI, call(5)]}, "messages[1].tool_calls[0].function.arguments", "got 5"),
        ({"messages": []}, "messages", "got []"),
        ({"messages": ["text"]}, "messages[0]", "got"),
        ({"messages": [{"role": "system"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "allowed is 'sys"),
        *(
            ({"messages": [{"role": "user", "content": content}]}, "messages[0].content", text)
            for content, text in (
                (None, "got null"),
                ([], "got []"),
                (["x", 5], "got 5 as part 1"),
                ([{"type": "text"}], "no text"),
                ([{"type": "image_url", "image_url": {"url": "x"}}], 'part 0 has type "image_url"'),
            )
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": call("")["tool_calls"]}]},
            "messages[0].tool_calls",
            "role user",
        ),
        ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages", "role 'tool'"),
    ],
)
def test_bad_requests(fields: dict[str, Any], param: str, text: str, v32: Live) -> None:
    answer = v32.http.post("/v1/chat/completions", json={"messages": HI, **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith((f"{param}: ", "tool_choice: "))
    assert text in error["message"]


@pytest.mark.parametrize("choice", ["required", tool(name="now")])
def test_forced_calls_have_a_grammar(choice: Any, v32: Live) -> None:
    v32.client.chat.completions.create(**asked(V32, tool_choice=choice))
    _, params = list(v32.engine.requests.values())[-1]
    form = params.structured_outputs
    assert form.source == "tools"
    assert ("get_weather" in form.grammar) is (choice == "required")
    assert params.reasoning == Reasoning("", "</think>")
    # the form of content, which a forced call has not
    v32.client.chat.completions.create(
        **asked(V32, tool_choice=choice, response_format={"type": "json_object"})
    )
    _, params = list(v32.engine.requests.values())[-1]
    assert params.structured_outputs == form
    body = {"messages": HI, "tools": TOOLS, "tool_choice": choice, "guided_regex": "a"}
    error = v32.http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "guided_regex"
    assert "use tool_choice auto" in error["message"]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_shown_and_called(mode: str, v32: Live) -> None:
    v32.client.chat.completions.create(**asked(V32, tool_choice=allowed(mode, "now", "now")))
    _, params = list(v32.engine.requests.values())[-1]
    assert "get_weather" not in prompt_of(v32) and '"now"' in prompt_of(v32)
    if mode == "auto":
        assert params.structured_outputs is None
    else:
        assert "get_weather" not in params.structured_outputs.grammar
        assert "now" in params.structured_outputs.grammar
    v32.client.chat.completions.create(**asked(V32, tool_choice=allowed("auto")))
    assert "TOOLS" not in prompt_of(v32)


def test_a_schema_that_no_grammar_enforces_is_refused_only_if_calls_are_forced(v32: Live) -> None:
    schema = {"type": "object", "properties": {"k": {"not": {"type": "string"}}}}
    function = {"name": "f", "parameters": schema}
    body = {"messages": HI, "tools": [{"type": "function", "function": function}]}
    answer = v32.http.post("/v1/chat/completions", json={**body, "tool_choice": "required"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tools")
    assert "parameters of 'f' cannot be forced: argument 'k': not: " in error["message"]
    assert v32.http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"guided_regex": "a"},
        {"guided_choice": ["a", "b"]},
        {"structured_outputs": {"grammar": 'start: "a"'}},
    ],
)
@pytest.mark.parametrize("thinking", [True, False])
def test_every_form_comes_after_the_reasoning(
    fields: dict[str, Any], thinking: bool, v32: Live
) -> None:
    body = {"messages": HI, "chat_template_kwargs": {"thinking": thinking}, **fields}
    assert v32.http.post("/v1/chat/completions", json=body).status_code == 200
    _, params = list(v32.engine.requests.values())[-1]
    assert params.reasoning == Reasoning("" if thinking else "<think>", "</think>")


def test_a_model_without_a_form_of_tool_calls_refuses_tools() -> None:
    with running(FakeEngine()) as live:
        body = {"messages": HI, "tools": TOOLS}
        error = live.http.post("/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == "tools"
        assert "--tool-call-parser" in error["message"]
        fine = {**body, "tool_choice": "none"}
        assert live.http.post("/v1/chat/completions", json=fine).status_code == 200
