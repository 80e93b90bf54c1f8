"""A decode step on a CPU checks and binds nothing that it has checked and bound before."""

from __future__ import annotations

import pytest

from benchmarks.python_calls import count_calls

# half of what a step made when each operator checked each call
MOST_CALLS = 948


def test_a_decode_step_makes_few_python_calls() -> None:
    pytest.importorskip("paddle")
    calls = count_calls()
    assert calls.total() <= MOST_CALLS, calls.most_common(20)
    # a shape is checked when it is first seen
    assert sum(count for name, count in calls.items() if ":check_" in name) <= 36
