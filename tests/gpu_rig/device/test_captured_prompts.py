"""Steps with prompts from graphs: logits and caches are those of eager steps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.ops import dense_kernels
from fd_dsa.runner import ModelRunner
from fd_dsa.runner.step_graphs import CaptureError
from fd_dsa.startup.capture import capture_graphs
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_demo_end_to_end import tiny_runner
from tests.gpu_rig.device.test_formats import BOUNDS, FP8, SIZES, WIDE_HEADS, folder_of, runner_on
from tests.runner.tiny import V32

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]

TOPK, LONGEST = 12, 48
IDS = np.random.default_rng(7).integers(2, 50, (4, LONGEST)).tolist()
Row = tuple[int, int, int, bool]
MANY_KEYS: list[Row] = [(row, 4, 8, True) for row in range(4)]
# (row, new tokens, tokens before them, whether of a prompt); rows whose last token is sampled, and
# tokens and longest row of the graph. A later step reads the keys of the steps before it.
STEPS: tuple[tuple[list[Row], Sequence[int], tuple[int, int] | None], ...] = (
    ([(2, 5, 0, True)], [2], (8, TOPK)),
    ([(0, 3, 0, True), (1, 1, 0, True), (2, 4, 5, True)], [0, 2], (8, TOPK)),
    # beside decode rows
    ([(0, 1, 3, False), (2, 2, 9, False), (3, 9, 0, True)], [0, 2, 3], (16, TOPK)),
    # across the selection, and nothing is sampled
    ([(1, 14, 1, True)], [], (16, LONGEST)),
    # decode rows past it, one with a draft
    ([(0, 5, 4, True), (1, 2, 15, False), (2, 1, 11, False)], [0, 1, 2], (8, LONGEST)),
    # all tokens of prompts past it, then a chunk that goes on from them beside a short one
    ([(1, 8, 17, True)], [1], (8, LONGEST)),
    ([(1, 9, 25, True), (3, 4, 9, True)], [1, 3], (16, LONGEST)),
    # 40 keys, as many as a graph of 16 tokens gathers
    ([(row, 4, 6, True) for row in range(4)], [0, 1, 2, 3], (16, TOPK)),
    (MANY_KEYS, [1], None),
    # more tokens than a graph has, and more decode tokens than it has logits
    ([(2, 17, 0, True)], [2], None),
    ([(0, 2, 8, False), (1, 3, 8, False), (3, 3, 0, True)], [3], None),
)


def logits_of(runner: ModelRunner, rows: list[Row], sampled: Sequence[int]) -> np.ndarray:
    """Logits of the last token of some rows of a step."""
    batch = runner.input_batch
    batch.begin_step()
    last = {
        row: batch.add_row(row, IDS[row][done : done + new], done, is_prefill)
        for row, new, done, is_prefill in rows
    }
    return np.array(runner.execute_model(np.array([last[row] for row in sampled], np.int64)))


def absorbed(rig: Rig, folder: Path) -> ModelRunner:
    """Float32: prompts attend as decode rows do."""
    return tiny_runner(V32, "float32", rig.device)


def dense(rig: Rig, folder: Path) -> ModelRunner:
    """FP8 weights and activations in bfloat16: prompts attend by keys and values of every head."""
    runner = runner_on(folder, rig.device)
    assert runner.attn_backends[0].attention.dense_prompts is not None
    return runner


@contextmanager
def captured(
    rig: Rig,
    runner: ModelRunner,
    sizes: tuple[int, ...] = (1,),
    prompts: tuple[int, ...] = (16, 8),
    capture: Any = None,
) -> Iterator[None]:
    """Capture steps of a runner that keeps its blocks. Its graphs are gone before the process."""
    tables = runner.input_batch.block_tables.copy()
    capture_graphs(runner, sizes, capture or capture_of(rig), prompts)
    for row, table in enumerate(tables):
        runner.input_batch.set_blocks(row, table)
    try:
        yield
    finally:
        runner.graphs = None
        gc.collect()


def poison(tensor: Any) -> None:
    """Fill a tensor with NaN, or with an integer that is no index."""
    is_float = tensor.dtype in (paddle.float32, paddle.bfloat16)
    nothing = paddle.full(tensor.shape, float("nan") if is_float else 0x55, tensor.dtype)
    tensor.copy_(nothing.to(tensor.place), False)


def shared_memory(runner: ModelRunner) -> list[Any]:
    """Buffers of a runner that hold nothing from one step to the next."""
    attention = runner.attn_backends[0].attention
    found = [buffer for buffer, _ in attention._buffers.values()]
    if (prompts := attention.dense_prompts) is not None:
        found += [prompts.latents, prompts.rope, prompts._count, *prompts._lists]
    steps = runner.device_steps
    assert steps is not None
    return [*found, steps.logits_memory(steps.buffer.num_rows)]


@pytest.fixture
def pair(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Rig, Path], Any]
) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    """An eager runner and one with graphs, with caches of NaN."""
    fields: dict[str, Any] = V32 | SIZES | WIDE_HEADS | {"v_head_dim": 128} | FP8
    folder = folder_of(tmp_path, fields, "fp8")
    eager, graphs = make(rig, folder), make(rig, folder)
    with captured(rig, graphs):
        for runner in (eager, graphs):
            for cache in runner.caches:
                poison(cache)
        if not rig.is_real:
            # memory of a graph has the values of another one
            monkeypatch.setattr(dense_kernels, "empty", poisoned_memory)
        yield eager, graphs


def run_both(
    pair: tuple[ModelRunner, ModelRunner], rows: list[Row], sampled: Sequence[int], bound: float
) -> None:
    """Run a step eagerly and from a graph, which then has other values in its buffers."""
    eager, graphs = pair
    wanted = logits_of(eager, rows, sampled)
    for buffer in shared_memory(graphs):
        poison(buffer)
    found = logits_of(graphs, rows, sampled)
    assert found.shape == (len(sampled), graphs.vocab_size)
    # GEMMs of the padded size may round otherwise
    limit = bound * np.abs(wanted).max(initial=0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=limit, err_msg=str(rows))


def check_caches(pair: tuple[ModelRunner, ModelRunner], bound: float) -> None:
    """Check that both runners wrote the same keys."""
    for one, other in zip(pair[0].caches, pair[1].caches, strict=True):
        same = np.isclose(one.numpy(), other.numpy(), bound, bound, equal_nan=True)
        assert same.mean() > 0.99


MAKERS = pytest.mark.parametrize(("make", "bound"), [(absorbed, 1e-5), (dense, BOUNDS["fp8"])])


@MAKERS
def test_logits_and_caches_are_those_of_eager_steps(
    pair: tuple[ModelRunner, ModelRunner], make: Callable[[Rig, Path], Any], bound: float
) -> None:
    eager, graphs = pair
    for rows, sampled, wanted_key in STEPS:
        run_both(pair, rows, sampled, bound)
        key = graphs.graph_key
        if rows is MANY_KEYS and make is absorbed:
            # no key is gathered
            wanted_key = 16, TOPK
        assert (key and key[:2]) == wanted_key, rows
    check_caches(pair, bound)
    assert sum(graphs.counters.graph_steps.values()) > 5
    assert not any(eager.counters.graph_steps.values())


@pytest.mark.slow
@MAKERS
@pytest.mark.parametrize("seed", range(2))
def test_random_steps_are_those_of_eager_ones(
    pair: tuple[ModelRunner, ModelRunner], bound: float, seed: int
) -> None:
    for rows, sampled in random_steps(np.random.default_rng(seed), 10):
        run_both(pair, rows, sampled, bound)
    check_caches(pair, bound)
    steps = pair[1].counters.graph_steps
    assert steps["prefill"] + steps["mixed"] > 4


def random_steps(rng: np.random.Generator, count: int) -> Iterator[tuple[list[Row], Sequence[int]]]:
    """Draw steps of prompts, chunks, prefix hits and decode rows with and without a draft."""
    lengths, room = [0] * 4, LONGEST - 8
    for _ in range(count):
        rows: list[Row] = []
        for row, length in enumerate(lengths):
            kind = rng.integers(4)
            if length and (kind == 0 or length > room):
                # another request whose prompt begins with cached tokens
                length = int(rng.integers(min(length, room)))
            if kind == 1 and length:
                rows.append((row, int(rng.integers(1, 3)), length, False))
            elif kind < 3:
                rows.append((row, int(rng.integers(1, 9)), length, True))
            else:
                continue
            lengths[row] = length + rows[-1][1]
        if rows:
            yield (
                rows,
                [row for row, _, _, is_prompt in rows if not is_prompt or rng.random() < 0.5],
            )


def poisoned_memory(shape: Sequence[int], dtype: Any, place: Any) -> Any:
    """Allocate as `dense_kernels.empty`, with NaN or 0x55 in all values."""
    made = paddle.empty(list(shape), dtype=dtype, device=place)
    if 0 not in made.shape:
        poison(made)
    return made


def test_steps_with_prompts_stay_eager_where_they_cannot_be_captured(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    runner, sizes = tiny_runner(V32, "float32", rig.device), []

    def refusing(place: Any) -> Any:
        capture = capture_of(rig)(place)

        def one(work: Callable[[], Any]) -> Any:
            made = capture(work)
            step = runner.forward_meta
            assert step is not None
            sizes.append(step.token_ids.shape[0])
            if sizes[-1] == 8:
                raise CaptureError("no memory")
            return made

        return one

    with captured(rig, runner, capture=refusing):
        assert runner.graphs is not None and not runner.graphs.prompts
        assert sizes[0] == 16 and sizes.count(8) == 1
        assert {key.num_tokens for key in runner.graphs} == {1}
        assert "steps with prompts stay eager, they cannot be captured: no memory" in caplog.text
        logits_of(runner, *STEPS[0][:2])
        assert runner.graph_key is None
