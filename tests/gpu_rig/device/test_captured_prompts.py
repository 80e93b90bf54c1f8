"""Steps of short prompts from graphs: logits and caches are those of eager steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.runner import ModelRunner
from fd_dsa.startup.capture import capture_graphs
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_demo_end_to_end import tiny_runner
from tests.gpu_rig.device.test_formats import BOUNDS, FP8, SIZES, WIDE_HEADS, folder_of, runner_on
from tests.runner.tiny import V32

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]

IDS = np.random.default_rng(7).integers(2, 50, (4, 30)).tolist()
# (row, new tokens, tokens before them, whether of a prompt), and the keys of the graph; a selection
# of 12, and a chunk that goes on from keys that a graph has written
STEPS = (
    ([(2, 5, 0, True)], 8),
    ([(2, 4, 5, True)], 12),
    ([(0, 3, 0, True), (1, 1, 0, True), (3, 6, 0, True)], 12),
    ([(0, 1, 3, True), (3, 1, 6, True)], 12),
    # in the cache, and past the selection
    ([(0, 8, 4, True), (2, 1, 9, True)], None),
    ([(1, 14, 1, True)], None),
    ([(0, 1, 12, True), (2, 1, 10, False)], None),
)


def last_logits(runner: ModelRunner, rows: list[tuple[int, int, int, bool]]) -> np.ndarray:
    """Logits of the last token of each row."""
    batch = runner.input_batch
    batch.begin_step()
    last = [
        batch.add_row(row, IDS[row][done : done + new], done, is_prefill)
        for row, new, done, is_prefill in rows
    ]
    return np.array(runner.execute_model(np.array(last)))


def absorbed(rig: Rig, folder: Path) -> ModelRunner:
    """Float32: prompts attend as decode rows do."""
    return tiny_runner(V32, "float32", rig.device)


def dense(rig: Rig, folder: Path) -> ModelRunner:
    """FP8 weights and activations in bfloat16: prompts attend by keys and values of every head."""
    runner = runner_on(folder, rig.device)
    assert runner.attn_backends[0].attention.dense_prompts is not None
    return runner


@pytest.mark.parametrize(("make", "bound"), [(absorbed, 1e-5), (dense, BOUNDS["fp8"])])
def test_logits_are_those_of_eager_steps(
    rig: Rig, tmp_path: Path, make: Callable[[Rig, Path], ModelRunner], bound: float
) -> None:
    fields: dict[str, Any] = V32 | SIZES | WIDE_HEADS | {"v_head_dim": 128} | FP8
    folder = folder_of(tmp_path, fields, "fp8")
    eager, graphs = make(rig, folder), make(rig, folder)
    tables = graphs.input_batch.block_tables.copy()
    capture_graphs(graphs, (1,), capture_of(rig), prompt_sizes=(8, 12))
    for row, table in enumerate(tables):
        graphs.input_batch.set_blocks(row, table)
    for runner in (eager, graphs):
        for cache in runner.caches:
            nothing = paddle.full(cache.shape, float("nan"), cache.dtype)
            cache.copy_(nothing.to(cache.place), False)
    for rows, size in STEPS:
        found, wanted = last_logits(graphs, rows), last_logits(eager, rows)
        assert (graphs.graph_key and graphs.graph_key.num_tokens) == size
        # GEMMs of the padded size may round otherwise
        np.testing.assert_allclose(found, wanted, rtol=0, atol=bound * np.abs(wanted).max())
    replayed = sum(size is not None for _, size in STEPS)
    assert sum(graphs.counters.graph_steps.values()) == replayed
    graphs.graphs = None
    gc.collect()
