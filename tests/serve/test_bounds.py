"""Every size that a client chooses: what is at its bound is served, one more is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from fd_dsa.serve import body as body_module
from fd_dsa.serve.body import MAX_DEPTH
from tests.engine.fakes import make_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import complete, error_of

HI = {"role": "user", "content": "Hi"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def wide() -> Iterator[Live]:
    """A server whose context takes every prompt of these tests."""
    with running(FakeEngine(max_model_len=4_000_000)) as live:
        yield live


def chat(live: Live, **fields: Any) -> Any:
    """POST a chat completion."""
    return live.http.post(
        "/v1/chat/completions", json={"messages": [HI], "max_tokens": 1, **fields}
    )


def tools(count: int) -> list[dict[str, Any]]:
    """Tools with names of their own."""
    return [{"type": "function", "function": {"name": f"f{i}"}} for i in range(count)]


def call(arguments: str) -> dict[str, Any]:
    """A message of the assistant that called a tool."""
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"function": function}]}


def text_of(num_chars: int) -> str:
    """Arguments of a call, of so many characters."""
    return json.dumps({"a": "x" * (num_chars - 9)})


ENTRIES = 4096
COMPLETION_BOUNDS: dict[str, tuple[Any, Any, str]] = {
    "logit_bias": (
        {str(i): 1 for i in range(ENTRIES)},
        {str(i): 1 for i in range(ENTRIES + 1)},
        f"has {ENTRIES + 1} entries; at most {ENTRIES}",
    ),
    "stop_token_ids": ([1] * ENTRIES, [1] * (ENTRIES + 1), f"at most {ENTRIES}"),
    "bad_words_token_ids": ([1] * ENTRIES, [1] * (ENTRIES + 1), f"at most {ENTRIES}"),
    "guided_choice": (["a"] * ENTRIES, ["a"] * (ENTRIES + 1), f"at most {ENTRIES}"),
    "stop": (["a"] * 64, ["a"] * 65, "has 65 entries; at most 64"),
    "stop ": (["a" * 512] * 16, ["a" * 512] * 16 + ["b"], "8193 characters in all; must be"),
    "bad_words": (["a"] * 1024, ["a"] * 1025, "has 1025 entries; at most 1024"),
    "bad_words ": (["a" * 512] * 64, ["a" * 512] * 64 + ["b"], "32769 characters in all; must be"),
    "cache_salt": ("a" * 512, "a" * 513, "got 513 characters; must be at most 512"),
    "guided_json": (
        {"description": "a" * (32_768 - 19)},
        {"description": ["a"] * 10_000},
        "characters or more; at most 32768",
    ),
}


@pytest.mark.parametrize("name", COMPLETION_BOUNDS)
def test_fields_of_completions(live: Live, name: str) -> None:
    most, too_much, text = COMPLETION_BOUNDS[name]
    field = name.strip()
    assert complete(live, **{field: most}).status_code == 200
    error = error_of(complete(live, **{field: too_much}), 400)
    assert error["param"] == field
    assert error["message"].startswith(field) and text in error["message"]


TEXT_PARTS = [{"type": "text", "text": "a"}] * (ENTRIES + 1)
CALLS = call("{}")["tool_calls"] * (ENTRIES + 1)
# field, what it may be at most, one more, the field to blame, what the refusal says
CHAT_BOUNDS: list[tuple[str, Any, Any, str, str]] = [
    ("messages", [HI] * ENTRIES, [HI] * (ENTRIES + 1), "", "4097 entries; at most 4096"),
    (
        "messages",
        [{**HI, "content": TEXT_PARTS[1:]}],
        [{**HI, "content": TEXT_PARTS}],
        "[0].content",
        "4097 parts; at most 4096",
    ),
    (
        "messages",
        [{**call("{}"), "tool_calls": CALLS[1:]}, HI],
        [{**call("{}"), "tool_calls": CALLS}, HI],
        "[0].tool_calls",
        "4097 entries; at most 4096",
    ),
    (
        "messages",
        [call(text_of(1 << 20)), HI],
        [call(text_of((1 << 20) + 1)), HI],
        "[0].tool_calls[0].function.arguments",
        "1048577 characters; at most 1048576",
    ),
    (
        "messages",
        [{**HI, **{f"x{i}": 1 for i in range(126)}}],
        [{**HI, **{f"x{i}": 1 for i in range(127)}}],
        "[0]",
        "129 fields; at most 128",
    ),
    ("tools", tools(1024), tools(1025), "", "1025 entries; at most 1024"),
    (
        "chat_template_kwargs",
        {f"x{i}": 1 for i in range(128)},
        {f"x{i}": 1 for i in range(129)},
        "",
        "129 entries; at most 128",
    ),
]


@pytest.mark.parametrize(("field", "most", "too_much", "part", "text"), CHAT_BOUNDS)
def test_fields_of_chat(
    wide: Live, field: str, most: Any, too_much: Any, part: str, text: str
) -> None:
    assert chat(wide, **{field: most}, tool_choice="none").status_code == 200
    error = error_of(chat(wide, **{field: too_much}, tool_choice="none"), 400)
    assert error["param"] == f"{field}{part}"
    assert f"has {text}" in error["message"]


def test_a_name_given_twice_is_found_among_all_tools(wide: Live) -> None:
    error = error_of(chat(wide, tools=[*tools(1000), tools(1)[0]], tool_choice="none"), 400)
    assert error["message"] == 'tools[1000].function.name: got "f0" a second time'
    named = {"type": "function", "function": {"name": "g"}}
    error = error_of(chat(wide, tools=tools(20), tool_choice=named), 400)
    assert error["message"].endswith("allowed are f0, f1, f2, f3, f4, f5, f6, f7 and 12 more")


def test_values_of_a_body() -> None:
    with running(FakeEngine(), max_body_values=100) as live:
        # 8 each for the object, the two names, the text and the list, 1 for each comma
        assert complete(live, x=[1] * 60).status_code == 200
        # the second one takes long to come, and a client that sends all before it reads sees no
        # broken connection
        for num_ids in (61, 3_000_000):
            message = error_of(complete(live, x=[1] * num_ids), 413)["message"]
            assert "more than 100 values, the --max-body-values of this server" in message
        # on the same connection
        assert complete(live).status_code == 200


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VALUES = "--max-body-values"


def attacks() -> list[tuple[str, dict[str, Any], int, str]]:
    """Path, fields, status and message; large, so made by the test that sends them."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 300_000}]
    return [
        (COMPLETIONS, {f"x{i}": 1 for i in range(128)}, 400, "body: has 129 fields; at most 128"),
        (
            "/detokenize",
            {"tokens": [97] * 257},
            400,
            "tokens: has 257 entries; at most max_model_len",
        ),
        (
            COMPLETIONS,
            {"x": json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)},
            400,
            "nests too deeply",
        ),
        (CHAT, {"tools": tools(200_000)}, 413, VALUES),
        (CHAT, {"tools": tools(20_000)}, 400, "at most 1024"),
        (CHAT, {"messages": [HI] * 350_000}, 413, VALUES),
        (CHAT, {"messages": parts}, 413, VALUES),
        (CHAT, {"messages": [{"x" * 1_000_000: 1}]}, 400, "messages[0].role: is missing"),
        (COMPLETIONS, {f"x{i}": 1 for i in range(300_000)}, 413, VALUES),
        (COMPLETIONS, {f"x{i}": 1 for i in range(200_000)}, 400, "at most 128"),
        (COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(1_000_000)}}, 413, VALUES),
        (COMPLETIONS, {"prompt": [1] * 2_500_000}, 413, VALUES),
        (COMPLETIONS, {"prompt": [1] * 1_000_000}, 400, "has 1000000 tokens"),
        (COMPLETIONS, {"bad_words": [1] * 1_000_000}, 400, "has 1000000 entries; at most 1024"),
        (COMPLETIONS, {"temperature": [[1] * 100_000] * 10}, 400, "temperature: got [[1, 1, 1"),
        (COMPLETIONS, {"model": "x" * 1_000_000}, 404, "model: got"),
        (
            COMPLETIONS,
            {"structured_outputs": {"regex": [1] * 100_000}},
            400,
            "structured_outputs is [1, 1, 1",
        ),
        (
            "/detokenize",
            {"tokens": [1] * 1_000_000},
            400,
            "has 1000000 entries; at most max_model_len",
        ),
    ]


def test_what_would_take_long_is_refused(live: Live) -> None:
    needed = {CHAT: {"messages": [HI]}, COMPLETIONS: {"prompt": "a"}}
    for path, fields, status, text in attacks():
        body = needed.get(path, {}) | fields
        error = error_of(live.http.post(path, content=orjson.dumps(body), headers=JSON), status)
        assert text in error["message"] and len(error["message"]) < 300
    for path, fields in (
        (COMPLETIONS, {"prompt": "a", **{f"x{i}": 1 for i in range(127)}}),
        ("/detokenize", {"tokens": [97] * 256}),
    ):
        assert live.http.post(path, json=fields).status_code == 200


def test_large_bodies_are_read_beside_the_event_loop(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    read = body_module.read_body

    def watched(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*args)

    monkeypatch.setattr(body_module, "read_body", watched)
    for num_chars in (10, 100_000):
        complete(live, user="x" * num_chars)
    on_loop, beside = threads
    assert beside.startswith("fd_dsa-front") and not on_loop.startswith("fd_dsa-front")


SCORED: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
PROMPT = [5, 6, 7]
# fields -> what an answer counts, by the rules of docs/operations.md
COUNTED: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/completions", {"logprobs": 2}, 4 * 3, "logprobs"),
    ("/v1/completions", {"logprobs": 0, "n": 3}, 3 * 4, "logprobs"),
    ("/v1/completions", {"logprobs": 2, "n": 2, "echo": True}, 2 * 7 * 3, "logprobs"),
    ("/v1/completions", {"prompt_logprobs": 4, "n": 2}, 2 * 3 * 5, "prompt_logprobs"),
    ("/v1/completions", {"prompt": [PROMPT, PROMPT], "logprobs": 2}, 2 * 4 * 3, "logprobs"),
    ("/v1/completions", {"prompt": [5] * 16, "echo": True, "n": 3}, 3 * 2, "n"),
    ("/v1/completions", {"prompt": [5] * 16, "return_token_ids": True, "n": 3}, 3 * 2, "n"),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 1, "n": 2}, 2 * 4 * 2, "logprobs"),
]


@pytest.mark.parametrize(("path", "fields", "count", "param"), COUNTED)
def test_scores_of_an_answer(path: str, fields: dict[str, Any], count: int, param: str) -> None:
    asked = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [HI]}
    for limit in (count, count - 1):
        with running(threaded(make_engine(chats=True)), max_answer_scores=limit) as live:
            answer = live.http.post(path, json={**asked, **SCORED, **fields})
            if limit == count:
                assert answer.status_code == 200, answer.text
                continue
            error = error_of(answer, 400)
            assert error["param"] == param
            assert f"could have {count} log-probabilities" in error["message"]
            assert f"--max-answer-scores is {limit}" in error["message"]


def test_a_chat_without_max_tokens_has_room_for_its_scores() -> None:
    with running(FakeEngine(), max_answer_scores=30) as live:
        fields = {"messages": [HI], "logprobs": True, "top_logprobs": 4}
        for num_choices, max_tokens in ((1, 6), (2, 3), (7, 1)):
            live.engine.requests.clear()
            answer = live.http.post("/v1/chat/completions", json={**fields, "n": num_choices})
            if num_choices < 7:
                ((_, params),) = live.engine.requests.values()
                assert params.max_tokens == max_tokens
        assert error_of(answer, 400)["param"] == "logprobs"
