"""Dummy runs, captures and padded replays in the double's runner, and what a step costs there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.driver import Job
from tests.fakes.trees import TREES
from tests.fastdeploy_plugin.engines import ours, prompt
from tests.fastdeploy_plugin.watching import (
    CREATIONS,
    own_costs,
    small_engine,
    watch_steps,
)

SERVED = ["pr7367", "develop"]
GRAPHS = {"use_cudagraph": True, "cudagraph_capture_sizes": [6, 4, 1]}
ROWS = {"max_num_seqs": 6, "enable_overlap_schedule": False}


def jobs(count: int) -> list[Any]:
    """Rows of other lengths, which stop after other numbers of tokens."""
    return [Job(prompt(20 + 11 * n, n), 4 + n) for n in range(count)]


@pytest.mark.parametrize("tree", SERVED)
def test_a_dummy_run_is_one_prompt_step_then_decode_steps(tree: str) -> None:
    with ours(TREES[tree]):
        engine = small_engine(**ROWS)
        watch = watch_steps(engine)
        engine.runner._dummy_run(num_tokens=10, batch_size=2, expected_decode_len=3)
    assert [step.lengths[:, :2].tolist() for step in watch.steps] == [
        [[5, 5], [0, 0], [5, 5]],
        *([[0, 0], [5 + n, 5 + n], [1, 1]] for n in range(3)),
    ]
    metas = [step.forward_meta for step in watch.steps]
    assert all(meta.is_dummy_or_profile_run and not meta.step_use_cudagraph for meta in metas)
    # windows belong to prompts: a decode step has none
    windows = [meta.indexer_attn_mask_offsets for meta in metas]
    assert [one is None for one in windows] == [False, True, True, True]
    assert windows[0].shape == [20]


@pytest.mark.parametrize("tree", SERVED)
def test_a_step_of_graphs_makes_no_tensor_and_waits_for_nothing(tree: str) -> None:
    with ours(TREES[tree]):
        engine = small_engine(**ROWS, **GRAPHS)
        waiting = jobs(3)
        engine.step(waiting)
        engine.step(waiting)
        watch = watch_steps(engine)
        with own_costs(engine) as costs:
            engine.step(waiting)
        assert [step.with_graph for step in watch.steps] == [True]
        assert costs == []


@pytest.mark.parametrize("tree", SERVED)
def test_no_kind_of_step_waits_and_no_layer_makes_a_tensor(tree: str) -> None:
    """Prompts, later chunks, prefix hits and decode rows."""
    with ours(TREES[tree]):
        engine = small_engine(**ROWS)
        watch = watch_steps(engine)
        with own_costs(engine) as costs:
            first = Job(prompt(90), 4, chunk=64)
            engine.generate([first, Job([*prompt(70), 7], 4, after=first), Job(prompt(9), 6)])
        assert {"prefill", "mixed", "decode", "later chunk"} <= watch.kinds()
        # the first step of a size makes views, before its layers
        assert all(name in CREATIONS and not in_a_layer for name, in_a_layer in costs), costs


@pytest.mark.parametrize("num_layers", [1, 6])
def test_metadata_is_made_once_a_step_whatever_the_layers(num_layers: int) -> None:
    with ours():
        engine = small_engine(**ROWS, num_hidden_layers=num_layers)
        watch = watch_steps(engine)
        builder = engine.runner.attn_backends[0].core.builder
        before = builder.num_builds
        engine.generate([Job(prompt(90), 4, chunk=64), Job(prompt(9), 6)])
        assert builder.num_builds - before == len(watch.steps)
        windows = [step.forward_meta.indexer_attn_mask_offsets for step in watch.steps]
        assert [w is not None for w in windows] == [s.lengths[0].any() for s in watch.steps]
