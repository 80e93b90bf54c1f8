"""DeepSeek-V4 from graphs: logits and pools of eager steps, whatever the memory held before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.device.resolve import free_device_bytes
from fd_dsa.ops import dense_kernels
from fd_dsa.runner import ModelRunner
from fd_dsa.runner.counters import EAGER_REASONS
from fd_dsa.runner.step_graphs import CaptureError
from fd_dsa.startup.capture import capture_graphs
from fd_dsa.startup.graph_sizes import graph_bytes
from fd_dsa.startup.warm_up import warm_up_kernels
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_captured_prompts import captured as kept_and_captured
from tests.gpu_rig.device.test_captured_prompts import poison, poisoned_memory, random_steps
from tests.gpu_rig.device.test_v4_model import (
    FEW_ITERATIONS,
    LONGEST,
    SMOOTH,
    device_model,
    device_runner,
    tokens_of,
)
from tests.gpu_rig.rows import NO_SLOTS, logits_of_rows
from tests.v4_model.cases import CSA, HCA, WINDOW, Case

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]

# experts by token id and by score, and a selection from 28 tokens on
SMALL: dict[str, Any] = FEW_ITERATIONS | {
    "layer_types": [WINDOW, CSA, HCA],
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
}
# (row, tokens before the step, and of a prompt in it); rows come and go, and begin at any length
Step = list[tuple[int, ...]]
STEPS: tuple[tuple[Step, tuple[int, int]], ...] = (
    # before and at the end of an entry of 4 tokens, of 16, of a block and of the window
    ([(0, 2)], (2, 27)),
    ([(0, 3), (2, 15)], (2, 27)),
    ([(0, 4), (1, 14), (2, 16)], (4, 27)),
    # the last one without a selection, and the first with one
    ([(1, 26)], (2, 27)),
    ([(1, 27), (2, 17)], (2, LONGEST)),
    ([(0, 5), (1, 28), (2, 47)], (4, LONGEST)),
    # a shorter step leaves arrays of the longer one
    ([(2, 63)], (2, LONGEST)),
    ([(0, 7), (2, 8)], (2, 27)),
)
PROMPTS: tuple[tuple[Step, tuple[int, int] | None], ...] = (
    ([(0, 0, 7)], (12, 27)),
    ([(0, 7), (1, 0, 9), (2, 15)], (12, 27)),
    ([(0, 8), (1, 9, 4), (3, 26, 3)], (12, LONGEST)),
    ([(0, 9, 13)], None),
)
RELEASED = {
    "sliding_window": 128,
    "layer_types": None,
    "compress_rates": None,
    "compress_ratios": [0, 4, 128],
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    # in bfloat16 tensor cores score these
    "index_head_dim": 128,
}
EAGER = dict.fromkeys(EAGER_REASONS, 0)
ROWS = SNAPSHOT = 4
"""Rows of a runner, and the first place of a snapshot."""


def pools_of(runner: ModelRunner) -> list[Any]:
    """All pools of a runner's layers."""
    layers = (
        (pools.ring, pools.entries, pools.index_entries, pools.states) for pools in runner.caches
    )
    return [pool for pools in layers for pool in pools if pool is not None]


def fill_pools(runner: ModelRunner) -> None:
    """Fill the pools with values, the same in every runner."""
    rng = np.random.default_rng(3)
    for pool in pools_of(runner):
        values = rng.standard_normal(pool.shape).astype(np.float32)
        pool.copy_(paddle.to_tensor(values, place=pool.place).astype(pool.dtype), False)


def forgetful(capture: Callable[[Any], Any], runner: ModelRunner) -> Callable[[Any], Any]:
    """A capture whose replays find no row in the host's batch, as a graph reads no host memory."""

    def make(place: Any) -> Callable[[Callable[[], Any]], Any]:
        native = capture(place)

        def captured(work: Callable[[], Any]) -> Any:
            result, replay = native(work)

            def forgetting() -> None:
                runner.input_batch.begin_step()
                replay()

            return result, forgetting

        return captured

    return make


@contextmanager
def captured(
    rig: Rig, runner: ModelRunner, sizes: tuple[int, ...], prompts: tuple[int, ...] = ()
) -> Iterator[None]:
    """Capture steps whose replays do not read the batch on the host."""
    with kept_and_captured(rig, runner, sizes, prompts, forgetful(capture_of(rig), runner)):
        assert runner.captured_sizes == sizes
        yield


def logits_of(runner: ModelRunner, step: Step, slots: Mapping[int, int] = NO_SLOTS) -> np.ndarray:
    """Logits of the last token of each row of a step, which writes snapshots of some rows."""
    rows = []
    for row, before, *new in step:
        ids = [2 + (7 * row + 5 * p) % 90 for p in range(before, before + sum(new or [1]))]
        rows.append((row, ids, before, bool(new)))
    return logits_of_rows(runner, rows, slots)


def poison_arrays(runner: ModelRunner) -> None:
    """Replace what no step may read before it is written in the step."""
    backend, steps = runner.attn_backends[0], runner.device_steps
    assert steps is not None
    for array in (*backend._places._arrays, steps.logits_memory(steps.buffer.num_rows)):
        poison(array)


@contextmanager
def pair_of(
    rig: Rig,
    model: Any,
    sizes: tuple[int, ...],
    prompts: tuple[int, ...] = (),
    dtype: str = "float32",
    block_size: int = 16,
    snapshots: int = 0,
) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    """An eager runner and one with graphs, with the same values in their pools."""
    longest = 2 * block_size if block_size > 16 else LONGEST
    own = dtype, block_size, ROWS, longest, snapshots
    eager, graphs = (device_runner(model, rig, *own) for _ in range(2))
    with captured(rig, graphs, sizes, prompts), pytest.MonkeyPatch.context() as patch:
        fill_pools(eager)
        fill_pools(graphs)
        if not rig.is_real:
            # memory of a graph has the values of another one
            patch.setattr(dense_kernels, "empty", poisoned_memory)
        yield eager, graphs


def pair(
    rig: Rig,
    case: Case,
    folder: Path,
    sizes: tuple[int, ...],
    prompts: tuple[int, ...] = (),
    dtype: str = "float32",
    snapshots: int = 0,
) -> AbstractContextManager[tuple[ModelRunner, ModelRunner]]:
    """`pair_of` of the model of a case."""
    model = device_model(case.write(folder), rig, dtype)
    return pair_of(rig, model, sizes, prompts, dtype, case.block_size, snapshots)


def check(
    eager: ModelRunner,
    graphs: ModelRunner,
    step: Step,
    bound: float = 1e-5,
    slots: Mapping[int, int] = NO_SLOTS,
) -> None:
    """Run a step eagerly and from a graph, whose arrays have other values before."""
    wanted = logits_of(eager, step, slots)
    poison_arrays(graphs)
    found = logits_of(graphs, step, slots)
    limit = bound * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=limit, err_msg=str(step))
    for one, other in zip(pools_of(eager), pools_of(graphs), strict=True):
        found, wanted = (pool.astype("float32").numpy() for pool in (other, one))
        np.testing.assert_allclose(found, wanted, rtol=10 * bound, atol=bound)


def key_of(runner: ModelRunner) -> tuple[int, int] | None:
    """Tokens and longest row of the graph of the newest step, None after an eager one."""
    return runner.graph_key and runner.graph_key[:2]


def test_decode_steps_are_those_of_eager_ones(rig: Rig, tmp_path: Path) -> None:
    with pair(rig, Case("small", SMALL, seed=31), tmp_path, (2, 4)) as (eager, graphs):
        for step, key in STEPS:
            check(eager, graphs, step)
            assert key_of(graphs) == key


def test_snapshots_of_captured_prompts(rig: Rig, tmp_path: Path) -> None:
    """Replays write the snapshots of eager steps, at the places that the step names."""
    case, snapshots = Case("small", SMALL, seed=31), 2
    steps: tuple[tuple[Step, dict[int, int]], ...] = (
        # a block ends in the first row; then in both, the other way round, and in none
        ([(0, 0, 20)], {0: SNAPSHOT}),
        ([(0, 20, 14), (2, 0, 17)], {0: SNAPSHOT + 1, 2: SNAPSHOT}),
        ([(0, 34), (2, 17, 20)], {2: SNAPSHOT + 1}),
        ([(1, 0, 5)], {}),
    )
    with pair(rig, case, tmp_path, (4,), (32,), snapshots=snapshots) as (eager, graphs):
        for step, slots in steps:
            check(eager, graphs, step, slots=slots)
            assert key_of(graphs) is not None
        [ring, *_] = pools_of(graphs)
        assert len(ring) % (SNAPSHOT + snapshots) == 0


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_steps_across_entries_of_128_tokens(
    rig: Rig, tmp_path: Path, dtype: str, bound: float
) -> None:
    """Windows, ratios and blocks have their released sizes."""
    case = Case("released", RELEASED, seed=32)
    with pair(rig, case, tmp_path, (2,), dtype=dtype) as (eager, graphs):
        for step in ([(0, 126), (1, 3)], [(0, 127), (3, 254)], [(0, 128), (3, 255)]):
            check(eager, graphs, step, bound)
            assert key_of(graphs) is not None


def test_steps_with_prompts(rig: Rig, tmp_path: Path) -> None:
    """Chunks alone and beside decode rows, up to and past the selection."""
    case = Case("small", SMALL, seed=33)
    with pair(rig, case, tmp_path, (4,), (12,)) as (eager, graphs):
        for step, key in PROMPTS:
            check(eager, graphs, step)
            assert key_of(graphs) == key
        assert graphs.counters.eager_steps == EAGER | {"tokens": 1}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_steps_are_those_of_eager_ones(rig: Rig, tmp_path: Path, seed: int) -> None:
    """Prompts, chunks and decode rows come in any order, and rows begin again at any length."""
    with pair(rig, Case("small", SMALL, seed=38), tmp_path, (4,), (24,)) as (eager, graphs):
        for rows, _ in random_steps(np.random.default_rng(seed), 10):
            step = [
                (row, before, new) if is_prompt or new > 1 else (row, before)
                for row, new, before, is_prompt in rows
            ]
            check(eager, graphs, step)
        steps = graphs.counters.graph_steps
        assert steps["prefill"] + steps["mixed"] > 4


def test_a_replay_is_one_copy_in_one_out_and_one_wait(rig: Rig, tmp_path: Path) -> None:
    model = device_model(Case("small", SMALL, seed=36).write(tmp_path), rig, "float32")
    runner, step = device_runner(model, rig, "float32", 16, 4), [(1, 27), (2, 17)]
    with captured(rig, runner, (2,)):
        # views of the sizes are made once
        logits_of(runner, step)
        with rig.strict(), rig.counting() as counted:
            logits_of(runner, step)
        assert key_of(runner) == (2, LONGEST)
    delta = counted.delta
    assert delta.pop("d2h_bytes") == 4 * 2 * runner.vocab_size
    in_bytes = delta.pop("h2d_bytes")
    if not rig.is_real:
        # the "graph" is the work, but no part of it waits
        for name in ("op_kernels", "peak_bytes", "allocations", "allocated_bytes"):
            delta.pop(name, None)
    copies = {"h2d_async": 1, "d2d_async": 1, "d2d_bytes": in_bytes, "d2h_async": 1}
    assert delta == copies | {"event_syncs": 1}


def test_a_refused_capture_leaves_steps_eager(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = device_model(Case("small", SMALL, seed=37).write(tmp_path), rig, "float32")
    runner = device_runner(model, rig, "float32", 16, 4)
    tables = runner.input_batch.block_tables.copy()

    def refuse(work: Callable[[], Any]) -> Any:
        raise CaptureError("no graphs here")

    capture_graphs(runner, (2,), lambda place: refuse)
    assert runner.graphs is None
    assert caplog.text.count("all steps stay eager, they cannot be captured: no graphs here") == 1
    runner.input_batch.set_blocks(0, tables[0])
    assert np.isfinite(logits_of(runner, [(0, 0, 5)])).all()
    assert runner.counters.eager_steps == EAGER | {"not_captured": 1}


@pytest.mark.own_gpu
def test_memory_of_graphs_is_within_the_plan(rig: Rig, tmp_path: Path) -> None:
    model = device_model(Case("small", SMALL, seed=34).write(tmp_path), rig, "float32")
    runner = device_runner(model, rig, "float32", 16, 4)
    if rig.is_real:
        # code of kernels is no memory of graphs
        warm_up_kernels(runner)
    before = free_device_bytes(rig.device) or 0
    with captured(rig, runner, (4,), (16,)):
        assert runner.graphs is not None
        planned = graph_bytes(model.config, (4,), LONGEST, (16,), 4, dtype="float32")
        if rig.is_real:
            taken = before - (free_device_bytes(rig.device) or 0)
            # 0 where the graphs fit into pages that the driver holds already
            assert 0 <= taken <= planned
            return
        largest = max(runner.graphs, key=lambda key: key.num_tokens)
        with rig.counting() as counted:
            runner.graphs[largest].replay()
    # of the driver for two graphs of each size
    taken = counted.delta["peak_bytes"] + 2 * 2 * (4 << 20)
    assert 0.3 * planned < taken <= planned


def watch_pending(runner: ModelRunner) -> list[bool]:
    """Collect, for each step, whether the host enqueues it without the tokens before it."""
    found, native = [], runner.stage

    def stage(*given: Any) -> Any:
        found.append(runner.input_batch.has_pending)
        return native(*given)

    runner.stage = stage  # type: ignore[method-assign]
    return found


def test_tokens_of_the_engine(rig: Rig, tmp_path: Path) -> None:
    """Greedy tokens are the CPU's, drawn ones those of eager steps, and steps run ahead."""
    case = Case("smooth", SMOOTH, seed=35)
    folder, prompts = case.write_served(tmp_path), [case.prompt(n) for n in (5, 13, 30)]
    sizes = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 64}
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    drawn = SamplingParams(temperature=1, seed=1, max_tokens=4, ignore_eos=True)
    with LLM(model=folder, device="cpu", **sizes) as llm:
        wanted = tokens_of(llm, prompts, greedy)
    # on a GPU the start would capture steps of its own
    own = {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 24}
    found = []
    for sizes_of_graphs in ((), (2, 4)):
        with LLM(model=folder, device=rig.device, **sizes, **own) as llm:
            runner = llm.engine.runner
            are_ahead = watch_pending(runner)
            if sizes_of_graphs:
                capture_graphs(runner, sizes_of_graphs, capture_of(rig))
            assert tokens_of(llm, prompts, greedy) == wanted
            found.append(tokens_of(llm, prompts[:2], drawn))
            assert (runner.counters.graph_steps["decode"] > 0) == bool(sizes_of_graphs)
            assert any(are_ahead)
            runner.graphs = None
        gc.collect()
    assert found[0] == found[1] != [one[:4] for one in wanted[:2]]
