"""Every answer of the server is a valid message of the next request, in each chat format."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chat.recorded import RECORDED, TOOLS, Recorded
from tests.serve.conftest import Live, chunks_of, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_tool_calls import HI, RENDERERS, engine_of, prompt_of


def ask(live: Live, messages: list[Any], **fields: Any) -> Any:
    """The answer to a conversation that offers tools; it is a success."""
    body = {"messages": messages, "tools": TOOLS, **fields}
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, (answer.text, messages)
    return answer


def send_back(live: Live, message: dict[str, Any]) -> str:
    """The prompt after an answer, the results of its calls and a question."""
    calls = message.get("tool_calls") or []
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in calls]
    ask(live, [*HI, message, *results, *HI], max_tokens=1)
    return prompt_of(live)


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream, as a client without a library joins it."""
    message: dict[str, Any] = {}
    for chunk in chunks:
        for name, value in chunk["choices"][0]["delta"].items():
            if name != "tool_calls":
                message[name] = message.get(name, "") + value
                continue
            for piece in value:
                calls = message.setdefault("tool_calls", [])
                if piece["index"] == len(calls):
                    calls.append(piece)
                else:
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    return message


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_answers_that_are_cut_at_any_token(recorded: Recorded) -> None:
    kwargs = {"chat_template_kwargs": {"thinking": recorded.in_reasoning}}
    num_cut = 0
    with running(engine_of(recorded)) as live:
        for num_tokens in (*range(1, len(recorded.tokens), 3), len(recorded.tokens)):
            answer = ask(live, HI, max_tokens=num_tokens, n=2, **kwargs).json()
            for choice in answer["choices"]:
                prompt = send_back(live, choice["message"])
            for call in choice["message"].get("tool_calls", ()):
                text = call["function"]["arguments"]
                try:
                    json.loads(text or "{}")
                except ValueError:
                    # the model sees what it wrote
                    assert text in prompt
                    num_cut += 1
        stream = ask(live, HI, stream=True, **kwargs)
        send_back(live, joined(chunks_of(stream)))
    assert num_cut or len(recorded.message.tool_calls) == 0


def assistant(**fields: Any) -> dict[str, Any]:
    """A message of the assistant with the empty fields that clients and servers add."""
    empty = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    return {"role": "assistant", "content": "said", **empty, **fields}


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    """A call as an answer has it."""
    function = {"name": "now", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function, **fields}


ANSWERS: dict[str, dict[str, Any]] = {
    "of the openai package": assistant(),
    "of vLLM": assistant(annotations=[], tool_calls=[], reasoning=None),
    "empty": assistant(content=""),
    "null": assistant(content=None),
    "without content": {"role": "assistant"},
    "refusal": assistant(content=None, refusal="said"),
    "refusal, part": assistant(content=[{"type": "refusal", "refusal": "said"}]),
    "part": assistant(content=[{"type": "text", "text": "said", "annotations": []}]),
    "part of the Responses API": assistant(content=[{"type": "output_text", "text": "said"}]),
    "reasoning": assistant(reasoning_content="why"),
    "reasoning of vLLM": assistant(reasoning="why"),
    "reasoning of Ollama": assistant(thinking="why"),
    "only reasoning": assistant(content="", reasoning_content="why"),
    "reasoning, call": assistant(content=None, reasoning="why", tool_calls=[call("{}")]),
    "joined deltas": assistant(tool_calls=[call("", index=0), call("{}", index=1, id="call_2")]),
    "call without a type": assistant(tool_calls=[call("{}", type=None)]),
    "call without an id": assistant(tool_calls=[{"function": {"name": "now"}}]),
}


# texts of objects whose values a format writes on its own
UNLIKE = ("", " ", '{"a": NaN}', '{"a": 1e400}')


@pytest.mark.parametrize("tool_format", sorted(RENDERERS))
def test_answers_of_clients_and_servers(tool_format: str) -> None:
    texts = ["", " ", "null", "[]", '"x"', "5", "NaN", '{"a": NaN}', '{"a": 1e400}', "{", "}{"]
    texts += ['{"city": "Par', '{"a": "\\ud800"}', "[" * 5000, '{"a": ' * 5000, "9" * 5000]
    texts += [None, {}, {"a": [1]}, "\x00", "{'a': 1}", '{"a": 1} and more']
    with running(FakeEngine(renderer=RENDERERS[tool_format], max_model_len=90_000)) as live:
        for message in ANSWERS.values():
            ask(live, [*HI, message, *HI])
            assert ("said" in prompt_of(live)) is ("said" in json.dumps(message))
        for text in texts:
            ask(live, [*HI, assistant(tool_calls=[call(text)]), *HI])
            if isinstance(text, str) and text not in UNLIKE:
                assert text in prompt_of(live)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (assistant(function_call={"name": "f", "arguments": "{}"}), "messages[1].function_call"),
        (assistant(audio={"id": "a"}), "messages[1].audio"),
        (assistant(prefix=True), "messages[1].prefix"),
        (assistant(partial=True), "messages[1].partial"),
        (assistant(tool_calls=[call([])]), "messages[1].tool_calls[0].function.arguments"),
        (assistant(content=[{"type": "image_url"}]), "messages[1].content"),
        (assistant(content=[{"type": []}]), "messages[1].content"),
        ({"role": "user", "content": "x", "images": ["x"]}, "messages[1].images"),
        ({"role": "user", "content": "x", "refusal": "x"}, "messages[1].refusal"),
        ({"role": "user", "content": "x", "thinking": "x"}, "messages[1].thinking"),
        ({"role": "tool", "tool_call_id": "a", "content": None}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], param: str, live: Live) -> None:
    answer = live.http.post("/v1/chat/completions", json={"messages": [*HI, message, *HI]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
