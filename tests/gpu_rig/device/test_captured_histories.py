"""Random histories of requests whose steps with prompts are graphs of several sizes, or eager."""

from __future__ import annotations

import pytest

from fd_dsa.config import EngineConfig
from tests.soak import captured_v4
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


def test_histories_of_deepseek_v4_capture_steps_that_their_engines_have() -> None:
    num_drafts = set()
    for number in range(40):
        history = captured_v4.draw_history(number)
        if not history.decode_sizes:
            continue
        config = EngineConfig(device="cpu", **history.options)
        assert max(history.decode_sizes) == config.max_decode_tokens
        num_drafts.add(config.max_drafts)
    assert num_drafts == {0, 2}
