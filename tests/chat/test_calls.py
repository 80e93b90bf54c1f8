"""Random calls come back as they were meant, and a slip never changes one."""

from __future__ import annotations

import random
import time

import pytest

from fd_dsa.chat.events import Message, join_events
from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser
from tests.chat.calls import (
    MARKS,
    TOOLS,
    WRITERS,
    is_ambiguous,
    meant,
    random_calls,
    slip,
)


def _parser(name: str, in_reasoning: bool = False) -> OutputParser:
    return OutputParser(AnswerFormat(True, in_reasoning, TOOL_FORMATS[name], TOOLS))


def _in_random_pieces(rng: random.Random, name: str, text: str) -> Message:
    one, events, begin = _parser(name), [], 0
    while begin < len(text):
        end = begin + rng.choice((1, 2, 3, 7, 20, 100))
        events += one.feed(text[begin:end])
        begin = end
    return join_events(events + one.finish())


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_values_may_contain_every_mark(name: str, count: int) -> None:
    rng = random.Random(f"{name} {count}")
    num_ambiguous = 0
    for _ in range(count):
        calls = random_calls(rng, 0.5)
        if is_ambiguous(TOOL_FORMATS[name], calls):
            num_ambiguous += 1
            continue
        text = "Hm." + "".join(piece for piece, _ in WRITERS[name](calls))
        message = _in_random_pieces(rng, name, text)
        assert [meant(call) for call in message.tool_calls] == calls, text
        assert message == _parser(name).parse(text)
        assert message.content == "Hm."
    assert num_ambiguous <= count // 20


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("count", [400, pytest.param(10000, marks=pytest.mark.slow)])
def test_a_slip_never_changes_a_call(name: str, count: int) -> None:
    """The calls that come back are calls that were meant; the text of the others is content.

    A text that is exactly how the model would write other calls, white space aside, means those.
    """
    rng = random.Random(f"{name} {count}")
    num_right = 0
    for _ in range(count):
        calls = random_calls(rng, 0.2)
        if is_ambiguous(TOOL_FORMATS[name], calls):
            continue
        text = "".join(piece for piece, _ in slip(rng, WRITERS[name](calls)))
        message = _in_random_pieces(rng, name, text)
        assert message == _parser(name).parse(text)
        read = [meant(call) for call in message.tool_calls]
        written = "".join(piece for piece, _ in WRITERS[name]([one for one in read if one]))
        if read and "".join(text.split()) == "".join(written.split()):
            continue
        remaining = iter(calls)
        assert all(one in remaining for one in read), text
        if not read:
            assert message.content == text
        for lost in calls:
            if lost not in read:
                values = [value for value in lost.arguments.values() if isinstance(value, str)]
                assert name == "deepseek_v31" or all(v in message.content for v in values), text
        num_right += read == calls
    assert num_right > count // 20


_HEADS = (
    "<tool_call>f<arg_key> begins",
    "<tool_call>f<arg_key>k</arg_key> begins",
    '<｜DSML｜invoke name="f"> begins',
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f"> begins',
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜> begins",
)


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("in_reasoning", [False, True])
def test_prose_that_names_marks_is_streamed(name: str, in_reasoning: bool) -> None:
    rng = random.Random(name)
    words = ("it", "begins", "a", "call,", "then", "f", "\n", "and", *_HEADS)
    prose = "Now " + "".join(
        f"{rng.choice(MARKS) if rng.random() < 0.4 else rng.choice(words)} " for _ in range(300)
    ).replace("</think>", "")
    one, held = _parser(name, in_reasoning), 0
    for character in prose:
        held += 1
        for event in one.feed(character):
            assert event.kind == ("reasoning" if in_reasoning else "content")
            held -= len(event.text)
        assert held <= 192, prose


_GLM = "<tool_call>f<arg_key>k</arg_key><arg_value>"
_DSML = '<｜DSML｜invoke name="f"><｜DSML｜parameter name="k" string="true">'
_V31 = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>"


@pytest.mark.parametrize(
    ("name", "head", "unit"),
    [
        ("glm47", "", "<tool_call>"),
        ("glm47", "", _GLM),
        ("glm47", "", f"{_GLM}x</arg_value><arg_key>!!<"),
        ("glm47", _GLM, "</arg_value>"),
        ("glm47", f"{_GLM}</arg_value>", " "),
        ("glm47", f'{_GLM}{{"a": "', "</arg_value></tool_call>"),
        ("glm47", "", f'{_GLM}["</arg_value></tool_call>'),
        ("glm47", "", f'{_GLM}["</arg_value></tool_call>"</arg_value></tool_call>'),
        ("deepseek_v32", _DSML, "</｜DSML｜parameter>"),
        ("deepseek_v32", "", "\n\n<｜DSML｜function_calls>"),
        ("deepseek_v31", _V31, '{"a":'),
        ("deepseek_v31", "", _V31),
    ],
)
@pytest.mark.parametrize("size", [4, 4096])
@pytest.mark.parametrize("in_reasoning", [False, True])
def test_the_cost_is_linear(name: str, head: str, unit: str, size: int, in_reasoning: bool) -> None:
    def seconds(length: int) -> float:
        text = head + unit * (length // len(unit))
        one = _parser(name, in_reasoning)
        begin = time.process_time()
        for place in range(0, len(text), size):
            one.feed(text[place : place + size])
        one.finish()
        return time.process_time() - begin

    seconds(1000)
    # a cost that grows with the square would be 64 times as high
    assert seconds(40_000) < 24 * seconds(5_000) + 0.1
