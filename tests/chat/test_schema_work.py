"""Schemas that repeat their parts: bounded work, and a look at the client in between."""

from __future__ import annotations

import threading
import time

import pytest

from fd_dsa.cancellation import Cancelled, cancelled_by
from fd_dsa.chat.grammar import forced_calls_grammar
from tests.soak.siege_work import SCHEMAS

# processor time; a busy machine takes twice that of an idle one
MOST_S, BLIND_S = 1.5, 0.5


class Looks(threading.Event):
    """Is never set, and keeps the longest processor time between two looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self._last = self.begin = time.thread_time()
        self.blind_s = 0.0

    def is_set(self) -> bool:
        """Never."""
        now = time.thread_time()
        self.blind_s = max(self.blind_s, now - self._last)
        self._last = now
        return False


@pytest.mark.parametrize("tool_format", ["deepseek_v31", "deepseek_v32", "glm47"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_the_work_for_a_schema_is_bounded(name: str, tool_format: str) -> None:
    looks = Looks()
    with cancelled_by(looks):
        try:
            assert forced_calls_grammar(tool_format, {"f": SCHEMAS[name]}, several=True)
        except ValueError as error:
            assert str(error).startswith("tools: ")
    looks.is_set()
    assert time.thread_time() - looks.begin < MOST_S
    assert looks.blind_s < BLIND_S


def test_all_tools_of_a_request_share_one_bound() -> None:
    patterns = {"x" * 50 + str(i): {} for i in range(20)}
    properties = {f"a{i}": {"type": "integer"} for i in range(20)}
    schema = {"type": "object", "patternProperties": patterns, "properties": properties}
    assert forced_calls_grammar("deepseek_v32", {"f": schema}, several=True)
    why = r"of 'f[1-9]' cannot be forced: patternProperties: got a schema with too much to compare"
    with pytest.raises(ValueError, match=why):
        forced_calls_grammar("deepseek_v32", {f"f{i}": schema for i in range(9)}, several=True)


def test_a_client_that_has_left_ends_the_work() -> None:
    stop = threading.Event()
    stop.set()
    with cancelled_by(stop), pytest.raises(Cancelled):
        forced_calls_grammar("glm47", {"f": {"type": "object"}}, several=True)
