"""Values in Python's notation, by the types of a schema and in calls."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.chat.loose_json import loose_json
from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser

_KEYS = st.text("a'\"\\ TrueNone")
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | _KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
)


@given(value=st.lists(_VALUES) | st.dictionaries(_KEYS, _VALUES))
def test_python_prints_lists_and_dicts(value: Any) -> None:
    text = loose_json(repr(value), {"array", "object"})
    assert text is not None and json.loads(text) == value


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("True", "boolean", "true"),
        ("FALSE", "boolean", "false"),
        ("1", "boolean", "true"),
        ("2", "boolean", None),
        ("None", "null", "null"),
        ("+5", "integer", "5"),
        ("007", "integer", "7"),
        ("5.0", "integer", None),
        ("five", "integer", None),
        (".5", "number", "0.5"),
        ("-5.", "number", "-5.0"),
        ("1,000", "number", None),
        ("['a', 1]", "object", None),
        ("{'a': 1, 'b'}", "object", None),
        ("__import__('os')", "object", None),
    ],
)
def test_values_by_the_type_of_the_schema(text: str, kind: str, found: str | None) -> None:
    assert loose_json(text, {kind}) == found


@pytest.mark.parametrize("text", ["'" + "\\'" * 100_000, "'" * 100_001, "[" * 100_000])
def test_long_texts_are_read_once(text: str) -> None:
    begin = time.process_time()
    assert loose_json(text, {"array"}) is None
    assert time.process_time() - begin < 2


def test_arguments_of_calls() -> None:
    flag: dict[str, Any] = {"type": "boolean"}
    schema = {"f": {"type": "object", "properties": {"flag": flag, "text": {"type": "string"}}}}
    pair = "<arg_key>{}</arg_key><arg_value>True</arg_value>"
    text = f"<tool_call>f{pair.format('flag')}{pair.format('text')}</tool_call>"
    (call,) = (
        OutputParser(AnswerFormat(False, False, TOOL_FORMATS["glm47"], schema))
        .parse(text)
        .tool_calls
    )
    assert json.loads(call.arguments) == {"flag": True, "text": "True"}
