"""Measurement of steps with prompts before the first request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.startup import build, warm_up
from fd_dsa.startup.measure import measure_step_table
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import V32, tiny_model, tiny_runner

# keys that the indexer selects, and the longest row
TOPK, MAX_LEN = V32["index_topk"], 64


class Timed:
    """Steps of a runner that take simulated time.

    Args:
        fixed_s, token_s, key_s: time of a step, of each of its tokens, and of each prompt token
            for each token before it.
    """

    def __init__(self, runner: ModelRunner, fixed_s: float, token_s: float, key_s: float) -> None:
        self.now, self.steps, self.ids = 0.0, list[tuple[int, int, int]](), list[int]()
        batch, execute = runner.input_batch, runner.execute_model

        def run(indices: np.ndarray) -> np.ndarray:
            prompt = int(batch.num_chunk_tokens.argmax())
            context = int(batch.num_computed_tokens[prompt])
            self.steps.append((batch.num_tokens, batch.num_prefill_tokens, batch.max_seqlen_k))
            self.ids += batch.token_ids[: batch.num_tokens].tolist()
            pairs = context * batch.num_prefill_tokens
            self.now += fixed_s + token_s * batch.num_tokens + key_s * pairs
            logits = execute(indices)
            # no step reads what no step has written
            assert np.isfinite(logits).all()
            return logits

        runner.execute_model = run  # type: ignore[method-assign]

    def clock(self) -> float:
        """Simulated time."""
        return self.now


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny model, whose indexer selects 12 keys."""
    return tiny_model(V32)


def measured(model: Any, sizes: tuple[int, ...], *times: float) -> tuple[Any, Timed, ModelRunner]:
    """The table of a runner with arbitrary values in its caches, which must not matter."""
    layout = model.config.cache_layout("float32", 4)
    runner = dsa_runner(model, InputBatch(5, 160, MAX_LEN // 4, 4), layout, MAX_LEN // 4)
    for cache in runner.caches:
        if cache is not None:
            np.from_dlpack(cache)[...] = np.nan
    timed = Timed(runner, *times)
    return measure_step_table(runner, MAX_LEN, sizes, timed.clock), timed, runner


def test_a_table_has_the_time_of_each_size_and_kind(model: Any) -> None:
    table, timed, runner = measured(model, (6, 8, 10, 16, 24), 0.01, 0.001, 1e-5)
    # of 16 tokens, 12 are a prompt of a short step; 24 have a longer one
    assert table.sizes == [6, 8, 10, 16] and table.index_topk == TOPK
    assert table.short == pytest.approx([0.016, 0.018, 0.02, 0.026])
    (near, few), (far, many) = table.near, table.far
    assert (near, far) == (TOPK, MAX_LEN - 12)
    pairs = np.array(table.sizes) - 4
    np.testing.assert_allclose(few, np.array(table.short) + 1e-5 * near * pairs)
    np.testing.assert_allclose(many, np.array(table.short) + 1e-5 * far * pairs)
    assert {longest > TOPK for _, _, longest in timed.steps[::6]} == {False}
    assert {longest > TOPK for _, _, longest in timed.steps[2::6]} == {True}
    # with equal ids a model would use the same experts for all tokens
    assert len(set(timed.ids)) > 8
    batch = runner.input_batch
    assert batch.num_tokens == 0 and (batch.block_tables == -1).all()
    assert runner.counters.mask_offsets_launched == 0


def test_a_measurement_ends_in_time(model: Any) -> None:
    """Sizes that are not measured have the time of the next larger one."""
    table, timed, _ = measured(model, (6, 8, 10, 16), 1.0, 0.0, 0.0)
    assert timed.now < 8 and table.sizes == [6, 8, 10, 16]
    assert table.short == table.near[1] == table.far[1] == [1.0] * 4


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 64), (4, 5)])
def test_a_runner_without_mixed_steps_has_no_table(
    model: Any, max_rows: int, max_tokens: int
) -> None:
    batch = InputBatch(max_rows, max_tokens, 4, 16)
    runner = dsa_runner(model, batch, model.config.cache_layout("float32", 16), 8)
    assert measure_step_table(runner, MAX_LEN, (6, 8)) is None


def test_rows_that_never_select_keys_have_a_table(model: Any) -> None:
    runner = tiny_runner(model)
    table = measure_step_table(runner, TOPK - 2, (6, 8))
    assert table is not None and len(table.short) == len(table.far[1]) == 2


def test_an_engine_starts_without_a_table_if_a_step_fails(
    model: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = tiny_runner(model)

    def fail(*_: object) -> None:
        runner.input_batch.add_row(0, [1], 0, True)
        raise RuntimeError("no room for a step")

    monkeypatch.setattr(build, "measure_step_table", fail)
    config = SimpleNamespace(target_inter_token_latency_ms=200)
    plan: Any = SimpleNamespace(device="gpu:0", config=config, max_model_len=MAX_LEN)
    monkeypatch.setattr(warm_up, "interprets", lambda device: False)
    assert build.measure_steps(runner, plan) is None
    assert "no room for a step" in caplog.text
    assert runner.input_batch.num_tokens == 0
    # without a target, and on a CPU, no step is measured
    config.target_inter_token_latency_ms = 0
    assert build.measure_steps(runner, plan) is None
    plan.device, config.target_inter_token_latency_ms = "cpu", 200
    assert build.measure_steps(runner, plan) is None
    assert len(caplog.records) == 1
