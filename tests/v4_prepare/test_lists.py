"""Lists made from the outputs of a step, against loops over its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.v4_prepare import V4Arrays, csa_translate, fused_list, v4_prepare_np
from tests.reference.v4_prepare import naive
from tests.v4_prepare.golden import CASES, config_of, inputs_of
from tests.v4_prepare.strategies import V4Step, steps


def compressed_row(step: V4Step, request: int, entry: int, ratio: int) -> int:
    """Where an entry lies."""
    per_block = step.cfg.block_size // ratio
    block = int(step.block_table[request, entry // per_block])
    return step.cfg.comp_base + block * per_block + entry % per_block


def chosen_entries(step: V4Step, seed: int) -> np.ndarray:
    """Numbers as an indexer might leave them: most are entries, some are not."""
    rng = np.random.default_rng(seed)
    shape = (step.cfg.max_num_tokens, step.cfg.index_topk)
    chosen = rng.integers(-2, 2 + step.cfg.max_model_len // step.cfg.csa_ratio, shape)
    return np.where(rng.random(shape) < 0.1, rng.choice([2**31 - 1, -(2**31)]), chosen)


@settings(max_examples=150, deadline=None)
@given(step=steps(), seed=st.integers(0, 2**16), dtype=st.sampled_from([np.int32, np.int64]))
def test_translated_entries(step: V4Step, seed: int, dtype: Any) -> None:
    out = v4_prepare_np(step.cfg, *step.inputs())
    chosen = chosen_entries(step, seed).astype(dtype)
    expected = []
    for t in range(int(out.counts[1])):
        visible = int(out.csa_visible[t])
        for entry in chosen[t, : min(visible, step.cfg.index_topk)].tolist():
            seen = 0 <= entry < visible
            request = int(out.req_of_token[t])
            row = compressed_row(step, request, entry, step.cfg.csa_ratio) if seen else -1
            expected.append(row)
    rows = csa_translate(out, step.block_table, chosen)
    assert rows.dtype == np.int32
    assert rows.tolist() == expected


@settings(max_examples=150, deadline=None)
@given(step=steps(hca_mode="list"), seed=st.integers(0, 2**16))
def test_fused_lists(step: V4Step, seed: int) -> None:
    out = v4_prepare_np(step.cfg, *step.inputs())
    oracle = naive(step.cfg, *step.inputs())
    csa_rows = csa_translate(out, step.block_table, chosen_entries(step, seed))
    parts = {
        "swa": (np.zeros_like(out.csa_indptr), np.zeros(0, np.int32)),
        "hca": (oracle["hca_indptr"], oracle["hca_idx"]),
        "csa": (oracle["csa_indptr"], np.full(len(csa_rows), -1)),
        "translated": (oracle["csa_indptr"], csa_rows),
    }
    for kind, (offsets, entries) in parts.items():
        if kind == "translated":
            indptr, rows = fused_list(out, "csa", csa_rows)
        else:
            indptr, rows = fused_list(out, kind)  # type: ignore[arg-type]
        expected: list[int] = []
        starts = [0]
        for t in range(step.cfg.max_num_tokens):
            expected += entries[offsets[t] : offsets[t + 1]].tolist()
            expected += oracle["win_idx"][t, : oracle["win_len"][t]].tolist()
            starts.append(len(expected))
        assert indptr.dtype == rows.dtype == np.int32
        assert (indptr.tolist(), rows.tolist()) == (starts, expected), kind


@pytest.fixture
def example() -> tuple[V4Arrays, list[list[int]]]:
    """Outputs and block table of the second example: 6 tokens, 16 chosen entries, topk 3."""
    inputs = inputs_of(CASES["G2"])
    return v4_prepare_np(config_of(CASES["G2"]["config"]), *inputs), inputs[3]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint64"])
def test_rows_lie_beyond_what_a_narrow_table_holds(dtype: str) -> None:
    case = CASES["G2"]
    *lengths, table = inputs_of(case)
    out = v4_prepare_np(config_of(case["config"], comp_base=500), *lengths, table)
    narrow = np.array(table, np.int64).astype(dtype)
    rows = csa_translate(out, narrow, case["csa_translate"]["local_topk"])
    expected = np.array(case["csa_translate"]["rows"])
    assert rows.tolist() == np.where(expected < 0, -1, expected - 44 + 500).tolist()


def test_wrong_choices_are_refused(example: tuple[V4Arrays, list[list[int]]]) -> None:
    out, table = example
    for shape in ((5, 3), (6, 2), (6, 4), (18,)):
        with pytest.raises(ShapeError, match=r"local_topk: got .*, must be \[6 or more, 3\]"):
            csa_translate(out, table, np.zeros(shape, np.int32))
    with pytest.raises(DtypeError, match="local_topk: got float64, must be an integer dtype"):
        csa_translate(out, table, np.zeros((6, 3)))
    with pytest.raises(ShapeError, match=r"block_table: got \(2, 6\), must be \[3 or more"):
        csa_translate(out, table[:2], np.zeros((6, 3), np.int32))
    with pytest.raises(DtypeError, match="block_table: got float64"):
        csa_translate(out, np.array(table, float), np.zeros((6, 3), np.int32))


def test_wrong_kinds_are_refused(example: tuple[V4Arrays, list[list[int]]]) -> None:
    out, _ = example
    with pytest.raises(ValueError, match="kind: got 'mla', allowed are 'swa', 'csa', 'hca'"):
        fused_list(out, "mla")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"csa_rows: got \(15,\), must be \(16,\)"):
        fused_list(out, "csa", np.zeros(15, np.int32))
    with pytest.raises(ValueError, match="csa_rows: got rows for kind 'hca'"):
        fused_list(out, "hca", np.zeros(16, np.int32))


def test_there_is_no_list_of_hca_rows_in_table_mode() -> None:
    case = CASES["G2"]
    out = v4_prepare_np(config_of(case["config"], hca_mode="table"), *inputs_of(case))
    with pytest.raises(ValueError, match=r"kind: got 'hca', .* table mode"):
        fused_list(out, "hca")
    assert fused_list(out, "csa")[0][-1] == 16 + 48


def test_an_empty_step_has_empty_lists() -> None:
    case = CASES["G5"]
    out = v4_prepare_np(config_of(case["config"]), *inputs_of(case))
    assert csa_translate(out, [], np.zeros((0, 3), np.int32)).tolist() == []
    for kind in ("swa", "csa", "hca"):
        indptr, rows = fused_list(out, kind)  # type: ignore[arg-type]
        assert not indptr.any() and len(rows) == 0
