"""Decode steps of the embedded engine from graphs: tokens of eager steps, and nothing beside them.

The forms without a GPU have no graphs. There a "graph" is the work itself, run again on what is
at the addresses of its capture, so all else of captured steps runs on them too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

import fd_dsa.attention.device_scores as device_scores
from fd_dsa import LLM, SamplingParams
from fd_dsa.errors import DeviceError
from fd_dsa.models.registry import read_config
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.runner.input_batch import SamplingInputs
from fd_dsa.runner.step_graphs import Captured, CaptureError, PaddleCapture
from fd_dsa.startup.capture import capture_graphs
from fd_dsa.startup.graph_sizes import graph_bytes
from fd_dsa.startup.warm_up import warm_up_kernels
from tests.demo.samples import PROSE
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_demo_end_to_end import tiny_runner
from tests.gpu_rig.device.test_formats import FP8, folder_of, runner_on
from tests.gpu_rig.device.test_formats import SIZES as FP8_SIZES
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import GLM, V32, run_rows

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]

SIZES = (1, 2, 4)
IDS = np.random.default_rng(7).integers(2, 50, (4, 40)).tolist()
# a selection of 12: (row, length before, length after) of decode rows; short, across it, past it
STEPS = (
    [(0, 3)],
    [(0, 4), (2, 10)],
    [(0, 5), (1, 11), (2, 11)],
    [(0, 6), (1, 12), (3, 30)],
    [(0, 7), (1, 13), (2, 12), (3, 31)],
    [(1, 14)],
)


@contextmanager
def captured(rig: Rig, runner: ModelRunner, sizes: tuple[int, ...] = SIZES) -> Iterator[Any]:
    """The runner with graphs, which are gone before the process ends."""
    capture_graphs(runner, sizes, capture_of(rig))
    assert runner.captured_sizes == sizes
    try:
        yield runner
    finally:
        runner.graphs = None
        gc.collect()


def filled(runner: ModelRunner) -> ModelRunner:
    """The runner with keys in its caches and blocks in its tables, the same in every runner."""
    rng, batch = np.random.default_rng(3), runner.input_batch
    for cache in runner.caches:
        if cache is not None:
            values = rng.standard_normal(cache.shape).astype(np.float32)
            if cache.dtype == paddle.bfloat16:
                # Paddle takes unsigned 16-bit numbers for the bits
                values = (values.view(np.uint32) >> 16).astype(np.uint16)
            cache.copy_(paddle.to_tensor(values, place=cache.place), False)
    blocks = rng.permutation(13)
    for row in range(batch.max_num_seqs):
        batch.set_blocks(row, blocks[3 * row : 3 * row + 3])
    return runner


def steps_of(rig: Rig) -> tuple[Any, ...]:
    """All steps, or where kernels are interpreted a short one and one past the selection."""
    return STEPS if rig.is_real else (STEPS[1], STEPS[3])


def rows_of(step: list[tuple[int, int]]) -> list[tuple[int, list[int], int, bool]]:
    """Rows of a decode step."""
    return [(row, [IDS[row][length]], length, False) for row, length in step]


@pytest.mark.parametrize(
    ("fields", "kv_cache_dtype"), [(V32, "float32"), (GLM, "bfloat16")], ids=["v32", "glm"]
)
def test_logits_are_those_of_eager_steps(
    rig: Rig, fields: dict[str, Any], kv_cache_dtype: str
) -> None:
    eager, graphs = (filled(tiny_runner(fields, kv_cache_dtype, rig.device)) for _ in range(2))
    with captured(rig, graphs, SIZES if rig.is_real else (2, 4)):
        # the capture took the blocks of row 0, and wrote to one
        filled(graphs)
        for step in steps_of(rig):
            wanted = np.array(run_rows(eager, rows_of(step)))
            found = run_rows(graphs, rows_of(step))
            assert graphs.graph_key is not None and graphs.graph_key.num_tokens >= len(step)
            # GEMMs of the padded size may round otherwise
            bound = (1e-5 if kv_cache_dtype == "float32" else 2e-3) * np.abs(wanted).max()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)
            assert (found.argmax(axis=1) == wanted.argmax(axis=1)).all()
        for index, (of_eager, of_graphs) in enumerate(
            zip(eager.caches, graphs.caches, strict=True)
        ):
            if of_eager is not None:
                same = of_eager.numpy() == of_graphs.numpy()
                assert same.mean() > 0.99, f"cache {index}"


def test_a_size_of_its_own_gives_the_same_bits(rig: Rig) -> None:
    eager, graphs = (filled(tiny_runner(V32, "float32", rig.device)) for _ in range(2))
    with captured(rig, graphs, (2,)):
        filled(graphs)
        for step in (STEPS[1], [(1, 14), (3, 30)]):
            wanted = np.array(run_rows(eager, rows_of(step)))
            np.testing.assert_array_equal(run_rows(graphs, rows_of(step)), wanted)


@pytest.mark.slow
def test_ten_thousand_replays_give_the_same_bits(rig: Rig, tmp_path: Path) -> None:
    fields = V32 | FP8_SIZES | FP8
    runner = filled(runner_on(folder_of(tmp_path, fields, "fp8"), rig.device))
    with captured(rig, runner, (4,)):
        filled(runner)
        # it writes what it wrote before, where it wrote it
        rows = rows_of([(0, 7), (1, 13), (2, 12), (3, 31)])
        first = np.array(run_rows(runner, rows))
        assert np.isfinite(first).all() and first.std() > 0
        for _ in range(10_000 if rig.is_real else 1):
            np.testing.assert_array_equal(run_rows(runner, rows), first)


def test_a_replay_is_one_copy_in_one_out_one_wait_and_no_memory(rig: Rig) -> None:
    runner = filled(tiny_runner(V32, "float32", rig.device))
    with captured(rig, runner, SIZES if rig.is_real else (4,)):
        filled(runner)
        # views of these sizes are made once
        for step in steps_of(rig):
            run_rows(runner, rows_of(step))
        for step in steps_of(rig):
            with rig.strict(), rig.counting() as counted:
                run_rows(runner, rows_of(step))
            delta, num_bytes = counted.delta, 4 * len(step) * runner.vocab_size
            assert delta.pop("d2h_bytes") == num_bytes
            in_bytes = delta.pop("h2d_bytes")
            if not rig.is_real:
                # the "graph" is the work, but no part of it waits
                for name in ("op_kernels", "peak_bytes", "allocations", "allocated_bytes"):
                    delta.pop(name, None)
            assert delta == {
                "h2d_async": 1,
                "d2d_async": 1,
                "d2d_bytes": in_bytes,
                "d2h_async": 1,
                "event_syncs": 1,
            }


def test_draws_of_graphs_are_those_of_eager_steps(rig: Rig) -> None:
    """Greedy, drawn, penalised and masked rows; the mask comes after the step is queued."""
    eager, graphs = (filled(tiny_runner(V32, "float32", rig.device)) for _ in range(2))
    given = [
        RowParameters(temperature=0.0),
        RowParameters(seed=5, top_p=0.9, top_k=20),
        RowParameters(seed=6, repetition=2.0, presence=1.0, bias={3: 2.0}),
        RowParameters(seed=7, banned=[1, 2], end_ids=[4], min_tokens=9),
    ]
    mask = np.full(-(-eager.vocab_size // 32), 0b1000100, np.int32)
    with captured(rig, graphs, (4,)):
        filled(graphs)
        found: dict[ModelRunner, list[list[int]]] = {eager: [], graphs: []}
        for runner, tokens in found.items():
            for batch_row, parameters in enumerate(given):
                runner.set_parameters(batch_row, parameters, [2, 3], [4])
            for index, step in enumerate((STEPS[3], STEPS[4], STEPS[4])):
                batch = runner.input_batch
                batch.begin_step()
                for row in rows_of(step):
                    batch.add_row(*row)
                batch_rows = [row for row, _ in step]
                masked = [1] if index else []
                positions = [3 + place for place in range(len(step))]
                mask_rows = [0 if row in masked else -1 for row in range(len(step))]
                sampling = SamplingInputs(batch_rows, positions, mask_rows=mask_rows)
                with rig.strict(), rig.counting() as counted:
                    runner.enqueue_model(np.arange(len(step)), sampling)
                    future = runner.sample([mask] * len(masked))
                tokens.append(future.result().tolist())
                logits = runner.execute_model(np.arange(len(step)))
                assert tokens[-1][0] == logits[0].argmax()
                assert "event_syncs" not in counted.delta
                if index == 2 and rig.is_real and runner is graphs:
                    # the step's inputs and the mask; the ids
                    names = ("h2d_async", "d2h_async", "allocations")
                    assert [counted.delta.get(name, 0) for name in names] == [2, 1, 0]
            assert (runner.graphs is not None) == (runner is graphs)
    assert found[eager] == found[graphs]
    assert all(tokens[1] % 32 in (2, 6) for tokens in found[graphs][1:])


def test_short_steps_score_nothing_and_long_ones_reach_the_longest_row(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths, score = [], device_scores.score_pages

    def recording(*args: Any, **kwargs: Any) -> None:
        widths.append(args[4].shape[1])
        score(*args, **kwargs)

    runner = filled(tiny_runner(V32, "float32", rig.device))
    monkeypatch.setattr(device_scores, "score_pages", recording)
    with captured(rig, runner, (2,)):
        filled(runner)
        # three blocks of 16 are all that a row has
        assert widths and set(widths) == {48}
        del widths[:]
        run_rows(runner, rows_of(STEPS[0]))
        assert widths == []
        run_rows(runner, rows_of(STEPS[-1]))
        # a replay launches nothing from here
        assert bool(widths) != rig.is_real


def test_prompts_and_steps_that_are_too_large_stay_eager(rig: Rig) -> None:
    runner = filled(tiny_runner(V32, "float32", rig.device))
    with captured(rig, runner, (1,)):
        filled(runner)
        for rows in (rows_of(STEPS[1]), [(0, IDS[0][:1], 0, True)], [(1, IDS[1][:3], 0, True)]):
            run_rows(runner, rows)
            assert runner.graph_key is None
        # of two rows that decode, one is not sampled from
        batch = runner.input_batch
        batch.begin_step()
        for row in rows_of(STEPS[1]):
            batch.add_row(*row)
        assert runner.execute_model(np.array([1])).shape == (1, runner.vocab_size)
        assert runner.graph_key is None


def test_what_cannot_be_captured_is_one_warning(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    runner = filled(tiny_runner(V32, "float32", rig.device))
    wanted = np.array(run_rows(runner, rows_of(STEPS[4])))

    error: Exception = CaptureError("RuntimeError: no graphs today")

    def refusing(place: Any) -> Any:
        def capture(work: Callable[[], Any]) -> Captured:
            work()
            raise error

        return capture

    with caplog.at_level("INFO", logger="fd_dsa"):
        capture_graphs(runner, SIZES, refusing)
    (warning,) = (r for r in caplog.records if r.levelname == "WARNING")
    assert "stay eager" in warning.getMessage() and "no graphs today" in warning.getMessage()
    assert runner.captured_sizes == () and runner.graphs is None
    filled(runner)
    np.testing.assert_array_equal(run_rows(runner, rows_of(STEPS[4])), wanted)
    # what nobody foresaw ends the start, with the cure
    error = SystemError("stack\n\nFatalError: the graph is gone\n")
    with pytest.raises(DeviceError, match=r"FatalError: the graph is gone; .*--enforce-eager"):
        capture_graphs(runner, SIZES, refusing)


@pytest.mark.parametrize(("most", "made"), [(0, 0), (3, 0), (4, 1)])
def test_a_second_stream_is_made_before_steps_that_fork_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, most: int, made: int
) -> None:
    runner = tiny_runner(V32, "float32", rig.device)
    overlap, calls = runner.attn_backends[0].overlap, []
    monkeypatch.setattr(overlap, "max_tokens", most)
    monkeypatch.setattr(overlap, "stream_for", calls.append)

    def refusing(place: Any) -> Any:
        def capture(work: Callable[[], Any]) -> Captured:
            raise CaptureError("not today")

        return capture

    capture_graphs(runner, (4, 8), refusing)
    assert len(calls) == made


def test_work_that_waits_for_the_host_is_refused_before_a_capture(rig: Rig) -> None:
    capture = PaddleCapture(rig.place)
    x = paddle.ones([4])
    with pytest.raises(CaptureError, match="exp"):
        capture(lambda: x.exp())
    # the process goes on, with what it had before
    assert x.exp().numpy().shape == (4,)


@pytest.mark.slow
def test_tokens_of_the_demo_model(rig: Rig, demo_folder: Path) -> None:
    """Rows that come and go beside padding, across the selection of 256 keys on a GPU."""
    large = rig.is_real
    prompts = ["Once upon a time", "The capital of France is"]
    if large:
        prompts += [f"{PROSE * 3}One day a fox named Ruby", "One day", "The old miller walked"]
    sizes = (1, 2, 4, 5) if large else (2,)
    options: dict[str, Any] = {
        "device": rig.device,
        "max_num_seqs": len(prompts),
        "max_num_batched_tokens": 64 if large else 7,
        "max_model_len": 1024 if large else 128,
        "num_gpu_blocks_override": 40 if large else 4,
    }
    lengths = (64, 40, 50, 12, 31) if large else (3, 2)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    for kv_cache_dtype in ("float32", "fp8_ds_mla") if large else ("float32",):
        answers = []
        for graphs in (False, True):
            options |= {"kv_cache_dtype": kv_cache_dtype, "enforce_eager": True}
            with LLM(str(demo_folder), **options) as llm:
                runner = llm.engine.runner
                if graphs:
                    capture_graphs(runner, sizes, capture_of(rig))
                    assert runner.captured_sizes == sizes
                answers.append([one.token_ids for one in llm.generate(prompts, params)])
                runner.graphs = None
            gc.collect()
        assert answers[0] == answers[1], kv_cache_dtype


def test_the_engine_captures_by_itself(real_rig: Rig) -> None:
    options = {"max_model_len": 512, "max_num_seqs": 4, "num_gpu_blocks_override": 32}
    with LLM(device=real_rig.device, cudagraph_capture_sizes=(1, 4), **options) as llm:
        runner = llm.engine.runner
        assert runner.captured_sizes == (1, 4)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        llm.generate(["Once upon a time"], params)
        assert runner.graph_key is not None and runner.graph_key.num_tokens == 1
        runner.graphs = None
    gc.collect()


@pytest.mark.own_gpu
def test_memory_of_graphs_is_within_the_plan(real_rig: Rig) -> None:
    from fd_dsa.config import demo_model_path
    from fd_dsa.device.allocation import paddle_allocator
    from fd_dsa.device.resolve import free_device_bytes
    from fd_dsa.models.device_weights import DeviceWeights
    from fd_dsa.models.registry import create_model

    config = read_config(demo_model_path())
    model = create_model(config, DeviceWeights("float32", paddle_allocator(real_rig.device)))
    batch = InputBatch(64, 64, 32, 64)
    runner = dsa_runner(model, batch, config.cache_layout("float32", 64), 40, real_rig.device)
    warm_up_kernels(runner)
    sizes = (1, 2, 4, 8, 16, 32, 64)
    before = free_device_bytes(real_rig.device) or 0
    with captured(real_rig, runner, sizes):
        taken = before - (free_device_bytes(real_rig.device) or 0)
        assert taken <= graph_bytes(config, sizes, 2048, dtype="float32"), taken
