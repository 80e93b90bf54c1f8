"""Work that bodies of many parts cause: linear in their size, and ended when the client leaves."""

from __future__ import annotations

import threading
import time
from typing import Any

import orjson
import pytest

from fd_dsa.cancellation import Cancelled, cancelled_by
from fd_dsa.chat.control import texts_in
from fd_dsa.serve.body import read_body
from fd_dsa.serve.chat_prompt import make_job
from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.protocol.chat import MAX_ARGUMENTS_CHARS
from fd_dsa.serve.state import ServerState
from tests.serve.fake_engine import FakeEngine
from tests.soak.hostile import BODIES

USER = {"role": "user", "content": "a"}
# least processor time of some runs; joining texts one by one takes five times as long
MOST_S, RUNS = 0.6, 3
MOST_VALUES = 1 << 21


def read(path: str, body: dict[str, Any]) -> Any:
    """The body as an endpoint gets it."""
    content = bytearray(orjson.dumps(body))
    return read_body(BODIES[path], [content], "application/json", MOST_VALUES)


def read_soon(path: str, body: dict[str, Any]) -> Any:
    """Read as `read` does, and assert that one of some runs is quick.

    Other processes slow a run down.
    """
    for _ in range(RUNS):
        begin = time.thread_time()
        found = read(path, body)
        if time.thread_time() - begin < MOST_S:
            return found
    raise AssertionError(f"{RUNS} runs took {MOST_S} s and more")


@pytest.mark.parametrize("kind", ["text", "thinking"])
def test_many_blocks_of_a_message_are_joined_once(kind: str) -> None:
    turn = {"role": "assistant", "content": [{"type": kind, kind: "a" * 3000}] * 4000}
    body = read_soon("/v1/messages", {"messages": [USER, turn, USER], "max_tokens": 1})
    assert sum(map(len, texts_in(body.chat.messages[1].for_template()))) > 12_000_000


def test_further_fields_of_a_message_are_not_copied() -> None:
    numbers = [0] * 1_000_000
    message = read("/v1/chat/completions", {"messages": [{**USER, "x": numbers, "y": None}]})
    (turn,) = message.messages
    fields = turn.for_template()
    assert fields["x"] is turn.model_extra["x"] and "y" not in fields


def test_many_items_of_a_message_are_joined_once() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    item = {"type": "message", "role": "assistant", "content": "a" * 3000}
    body = read_soon("/v1/responses", {"input": [USER, item, call, *[item] * 4000]})
    assert [len(message.content or "") for message in body.chat.messages] == [1, 12_003_000]


def test_an_object_of_arguments_is_as_long_as_a_text_may_be() -> None:
    def arguments(num_chars: int) -> dict[str, Any]:
        call = {"function": {"name": "f", "arguments": {"a": "x" * (num_chars - len('{"a": ""}'))}}}
        return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, USER]}

    body = read("/v1/chat/completions", arguments(MAX_ARGUMENTS_CHARS))
    assert len(body.messages[1].tool_calls[0].function.arguments) == MAX_ARGUMENTS_CHARS
    for num_chars in (MAX_ARGUMENTS_CHARS + 1, 8 * MAX_ARGUMENTS_CHARS):
        with pytest.raises(ApiError, match="at most 1048576 are allowed in one call") as refusal:
            read("/v1/chat/completions", arguments(num_chars))
        assert refusal.value.param == "messages[1].tool_calls[0].function.arguments"


NUMBERS = [0] * 10_000
CALL = {"function": {"name": "f", "arguments": {"x": NUMBERS}}}


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{**USER, "x": NUMBERS}]},
        {"chat_template_kwargs": {"x": NUMBERS}},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER]},
        {"messages": [USER] * 4000},
    ],
)
def test_preparing_a_prompt_ends_when_the_client_leaves(more: dict[str, Any]) -> None:
    state = ServerState(["demo"])
    state.loaded_engine = FakeEngine(max_model_len=1 << 20)  # type: ignore[assignment]
    body = read("/v1/chat/completions", {"messages": [USER], **more})
    make_job(state, body, "x")
    stop = threading.Event()
    stop.set()
    with cancelled_by(stop), pytest.raises(Cancelled):
        make_job(state, body, "x")
