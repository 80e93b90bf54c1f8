"""ModelRunner on tiny models: one metadata computation a step, whatever the layers and batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.startup.warm_up import warm_up_kernels
from tests.attention.harness import record_plans
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import (
    BLOCK_SIZE,
    BLOCKS_PER_ROW,
    GLM,
    V32,
    run_rows,
    tiny_model,
    tiny_runner,
)

TOLERANCE = 1e-4
PROMPT = np.random.default_rng(7).integers(2, 50, 45).tolist()


@pytest.fixture(scope="module", params=[V32, GLM], ids=["v32", "glm"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal except for the rounding of GEMMs of another size."""
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def in_chunks(runner: ModelRunner, row: int, chunks: list[int], decode_from: int) -> np.ndarray:
    """Logits of all tokens of `PROMPT`, run in these chunks."""
    done, logits = 0, []
    for n in chunks:
        ids = PROMPT[done : done + n]
        logits.append(run_rows(runner, [(row, ids, done, done < decode_from)]))
        done += n
    assert done == len(PROMPT)
    return np.concatenate(logits)


@pytest.mark.parametrize("num_layers", [2, 6])
def test_metadata_of_a_step_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, num_layers: int
) -> None:
    plans = record_plans(monkeypatch)
    runner = tiny_runner(tiny_model(V32 | {"num_hidden_layers": num_layers}))
    builder = runner.attn_backends[0].builder
    for step in range(3):
        run_rows(runner, [(0, PROMPT[step : step + 1], step, False), (1, [4, 5], 2 * step, True)])
        assert (builder.num_builds, len(plans)) == (step + 1, step + 1)


def test_logits_of_chosen_tokens(model: Any) -> None:
    runner = tiny_runner(model)
    batch = runner.input_batch

    def logits(indices: list[int]) -> np.ndarray:
        batch.begin_step()
        batch.add_row(0, PROMPT[:20], 0, True)
        return runner.execute_model(np.array(indices, np.int64))

    everything = logits(list(range(20))).copy()
    assert everything.shape == (20, runner.vocab_size)
    assert everything.dtype == np.float32
    assert_same(logits([19]), everything[19:])
    assert_same(logits([7, 3, 7]), everything[[7, 3, 7]])
    assert logits([]).shape == (0, runner.vocab_size)


def test_a_step_without_tokens_is_refused(model: Any) -> None:
    runner = tiny_runner(model)
    with pytest.raises(ValueError, match="no token; call add_row first"):
        runner.execute_model(np.zeros(0, np.int64))


def test_inconsistent_rows_are_refused(model: Any) -> None:
    runner = tiny_runner(model)
    runner.input_batch.clear_row(1)
    with pytest.raises(ValueError, match="block_tables: row 1, column 0 is -1"):
        run_rows(runner, [(1, [3, 4], 0, True)])
    assert runner.attn_backends[0].builder.num_builds == 0


def selections(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The slots that each layer attends to in a step of 45 tokens."""
    backend, found = runner.attn_backends[0], []
    original = backend.attend

    def recording(q: Any, selection: Any, *layer: Any) -> Any:
        found.append(np.from_dlpack(selection).tolist())
        return original(q, selection, *layer)

    monkeypatch.setattr(backend, "attend", recording)
    run_rows(runner, [(0, PROMPT, 0, True)])
    return found


def test_shared_layers_use_the_selection_before(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = GLM | {
        "num_hidden_layers": 5,
        "indexer_types": ["full", "shared", "shared", "full", "shared"],
    }
    runner = tiny_runner(tiny_model(fields))
    # a layer without an indexer has no indexer cache
    assert [cache is None for cache in runner.caches[1::2]] == [False, True, True, False, True]
    first, second, third, fourth, fifth = selections(runner, monkeypatch)
    assert first == second == third != fourth == fifth


def test_every_full_layer_selects_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = selections(tiny_runner(tiny_model(V32)), monkeypatch)
    assert one != two != three != one
    for layer in (one, two, three):
        # tokens with more than 12 keys name 12 of them, one with fewer names all
        assert all(len(set(row)) == 12 for row in layer[12:])
        assert layer[4][5:] == [-1] * 7


def test_a_row_of_nan_spoils_no_other_row() -> None:
    """A token whose embedding is NaN: its row is NaN, all others are as without it."""
    rows = [(0, PROMPT[:20], 0, True), (1, PROMPT[20:40], 0, True), (3, PROMPT[:9], 0, True)]
    model = tiny_model(V32)
    wanted = run_rows(tiny_runner(model), rows).copy()
    bad = next(token for token in range(2, 50) if token not in PROMPT)
    model.embed_tokens[bad] = np.nan
    runner = tiny_runner(model)
    rows[1] = (1, [*PROMPT[20:25], bad, *PROMPT[26:40]], 0, True)
    found = run_rows(runner, rows)
    others = [t for t in range(49) if not 25 <= t < 40]
    assert_same(found[others], wanted[others])
    assert np.isnan(found[25:40]).all()
    # and in the decode step after it, although the caches hold NaN
    ids = [(0, [5], 20, False), (1, [5], 20, False), (3, [5], 9, False)]
    after = run_rows(runner, ids)
    assert np.isfinite(after[[0, 2]]).all()
    assert np.isnan(after[1]).all()


def test_a_warm_up_leaves_an_empty_batch_and_no_trace(model: Any) -> None:
    wanted = in_chunks(tiny_runner(model), 0, [20, 25], 45)
    runner = tiny_runner(model, poison=True)
    tables = runner.input_batch.block_tables.copy()
    warm_up_kernels(runner)
    assert runner.input_batch.num_tokens == 0 and runner.input_batch.num_rows == 0
    assert (runner.input_batch.block_tables[0] == -1).all()
    for row, table in enumerate(tables):
        runner.input_batch.set_blocks(row, table)
    assert_same(in_chunks(runner, 0, [20, 25], 45), wanted)


def test_a_warm_up_of_more_rows_than_tokens(model: Any) -> None:
    batch = InputBatch(9, 4, BLOCKS_PER_ROW, BLOCK_SIZE)
    layout = model.config.cache_layout("float32", BLOCK_SIZE)
    runner = dsa_runner(model, batch, layout, BLOCKS_PER_ROW + 1)
    warm_up_kernels(runner)
    assert batch.num_tokens == 0 and (batch.block_tables == -1).all()


def test_a_warm_up_scores_keys(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = tiny_runner(model)
    plans = record_plans(monkeypatch)
    warm_up_kernels(runner)
    longest = BLOCK_SIZE * BLOCKS_PER_ROW
    powers = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < longest]
    sizes = sorted({*powers, *(size - 1 for size in powers[1:]), longest})
    topk, others = runner.model.config.index_topk, runner.input_batch.max_num_seqs - 1
    later = [size for size in sizes if size <= longest - topk]
    # of several prompts, which together have more tokens than a row
    most = min(runner.input_batch.max_num_tokens, longest * (others + 1))
    assert most > longest
    above = [size for size in (64, 128, 256) if longest < size < most]
    beyond = sorted({*above, *(size - 1 for size in above), most} - {*sizes})
    # rows that decode beside a prompt
    mixed = [1 + min(1 << power, others) for power in range(topk.bit_length())]
    assert [plan.num_tokens for plan in plans] == [*sizes, *later, *beyond, *mixed, 1, 1]
    # the decode step before the last has as many keys as are chosen
    assert [plan.needs_scores for plan in plans[len(sizes) :]] == [
        *[True] * (len(later) + len(beyond)),
        *[False] * (1 + len(mixed)),
        True,
    ]


def test_steps_are_counted_by_kind(model: Any) -> None:
    runner = tiny_runner(model)
    topk = model.config.index_topk
    run_rows(runner, [(0, PROMPT[:20], 0, True)])
    run_rows(runner, [(0, PROMPT[20:21], 20, False)])
    run_rows(runner, [(0, PROMPT[21:22], 21, False), (1, PROMPT[:9], 0, True)])
    counters = runner.counters
    assert {kind: sum(h.counts) for kind, h in counters.prepare_s.items()} == {
        "prefill": 1,
        "decode": 1,
        "mixed": 1,
    }
    assert all(h.total > 0 for h in counters.prepare_s.values())
    assert (counters.mask_offsets_launched, counters.mask_offsets_skipped) == (2, 1)
    assert set(counters.graph_steps.values()) == {0}
    keys = [*range(1, 21), 21, 22, *range(1, 10)]
    assert counters.sparse_tokens == sum(count > topk for count in keys) > 0
