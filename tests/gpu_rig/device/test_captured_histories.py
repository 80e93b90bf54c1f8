"""Random histories of requests whose steps with prompts are graphs of several sizes, or eager."""

from __future__ import annotations

import pytest

from tests.soak.captured import run_histories

pytestmark = [
    pytest.mark.gpu_rig,
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.own_process,
]


def test_graphs_and_eager_steps_of_one_history_change_no_output() -> None:
    counts = run_histories(first=1, count=1)
    # a history without them would change no output either
    for what in (
        "decode steps from graphs",
        "eager steps because of tokens",
        "mixed steps from graphs",
        "prefill steps from graphs",
        "prefix_cache_hits",
    ):
        assert counts[what] > 0, what
