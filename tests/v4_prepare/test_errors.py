"""Refused steps: which error, with which text, and that nothing was written before it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.errors import FdDsaError, V4PrepareError
from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Arrays, V4PrepareConfig, v4_prepare_np
from tests.strategies import examples
from tests.v4_prepare.cases import Step
from tests.v4_prepare.golden import CASES, config_of, error_config, inputs_of
from tests.v4_prepare.strategies import steps

GOOD = ([5, 5, 5], [1, 1, 1], [0, 1, 2], [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
FIELD = {"ctx": 0, "q": 1, "slot": 2, "block_table": 3}


def refuse(cfg: V4PrepareConfig, *inputs: Any) -> V4PrepareError:
    """The error of a step, after a look at all outputs: none may have changed."""
    out = V4Arrays(cfg)
    rng = np.random.default_rng(0)
    before = {}
    for name, shape in OUTPUT_SHAPES(cfg).items():
        before[name] = rng.integers(-(2**31), 2**31, shape, np.int32)
        getattr(out, name)[...] = before[name]
    with pytest.raises(V4PrepareError) as refused:
        v4_prepare_np(cfg, *inputs, out)
    for name, values in before.items():
        assert np.array_equal(getattr(out, name), values), name
    return refused.value


def changed(**changes: Any) -> list[Any]:
    """The good step of the error configuration with other inputs; row -> value, or all."""
    inputs: list[Any] = [list(one) for one in GOOD]
    for name, change in changes.items():
        if isinstance(change, dict):
            for row, value in change.items():
                inputs[FIELD[name]][row] = value
        else:
            inputs[FIELD[name]] = change
    return inputs


def test_the_good_step_is_good() -> None:
    assert v4_prepare_np(error_config(), *changed()).counts[1] == 3


def test_the_error_is_one_of_the_package_and_can_be_sent_on() -> None:
    error = refuse(error_config(), *changed(q={1: -1}))
    assert isinstance(error, FdDsaError) and isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.row) == (str(error), "E_QLEN", 1)


def wide(name: str, value: int, dtype: Any = np.int64) -> dict[str, np.ndarray]:
    """One input of the good step with an extreme number in row 1, in the first of its cells."""
    array = np.array(GOOD[FIELD[name]], dtype)
    array[(1, 0) if name == "block_table" else 1] = value
    return {name: array}


SHAPE = "E_SHAPE: batch: ctx, q, slot must be [B], block_table [B, MB]"
NO_INTEGERS, NO_ARRAY = "must be an integer dtype", "must be a NumPy array of integers or a list"
FOUR = {"slot": [0] * 4, "block_table": [[1]] * 4}
NARROW = [[1], [4], [7]]
REFUSED = [
    ({"ctx": [5, 5]}, SHAPE),
    ({"q": [1, 1]}, SHAPE),
    ({"slot": [0, 1, 2, 3]}, SHAPE),
    ({"block_table": [[1, 2, 3]]}, SHAPE),
    ({"block_table": [1, 2, 3]}, SHAPE),
    ({"block_table": [[1], [2, 3], [4]]}, SHAPE),
    ({"block_table": [[[1]], [[2]], [[3]]]}, SHAPE),
    ({"ctx": [[5], [5], [5]]}, SHAPE),
    ({"ctx": [], "q": [], "slot": []}, SHAPE),
    ({"ctx": np.array(5)}, SHAPE),
    ({"ctx": [5.0, 5, 5]}, f"E_DTYPE: batch: ctx has dtype float64, {NO_INTEGERS}"),
    ({"q": np.array([True] * 3)}, f"E_DTYPE: batch: q has dtype bool, {NO_INTEGERS}"),
    ({"slot": ["a", "b", "c"]}, f"E_DTYPE: batch: slot has dtype <U1, {NO_INTEGERS}"),
    (
        {"block_table": np.ones((3, 3))},
        f"E_DTYPE: batch: block_table has dtype float64, {NO_INTEGERS}",
    ),
    ({"q": [2**70, 1, 1]}, f"E_DTYPE: batch: q has dtype object, {NO_INTEGERS}"),
    ({"ctx": None}, f"E_DTYPE: batch: ctx is a NoneType, {NO_ARRAY}"),
    ({"slot": range(3)}, f"E_DTYPE: batch: slot is a range, {NO_ARRAY}"),
    # one past the last block
    ({"block_table": {1: [32, 5, 6]}}, "E_BLOCK: row 1: block_table[0]=32 not in [0, 32)"),
    # a step with two faults, and the one that is named
    ({"ctx": [5.0, 5.0], "q": [1, 1, 1]}, "E_SHAPE: batch"),
    ({"ctx": [5.0] * 4, "q": [1] * 4} | FOUR, "E_DTYPE: batch"),
    ({"ctx": [5] * 4, "q": [-1] * 4} | FOUR, "E_BATCH: batch: B=4 > Bcap=3"),
    ({"q": {2: -1}, "ctx": {1: 49}}, "E_CTX: row 1: ctx=49 > Lmax=48"),
    ({"q": {1: 4}, "ctx": {1: -1}}, "E_QLEN: row 1: q=4 > Qcap=3"),
    ({"ctx": {1: 49}, "slot": {1: 9}}, "E_CTX: row 1"),
    ({"ctx": {1: 49}, "slot": {0: 9}}, "E_SLOT: row 0: slot=9 not in [0, 4)"),
    ({"slot": {1: 4}, "ctx": {1: 33}, "block_table": NARROW}, "E_SLOT: row 1"),
    ({"slot": {2: 0}, "block_table": {1: [-1, 5, 6]}}, "E_BLOCK: row 1: block_table[0]=-1 not in"),
    ({"ctx": {1: 33, 2: -1}, "block_table": NARROW}, "E_TABLE: row 1: needs 3 blocks, table has 1"),
    ({"q": [3, 3, 3], "block_table": {2: [32, 5, 6]}}, "E_BLOCK: row 2: block_table[0]=32 not in"),
    ({"q": [3, 3, 3], "ctx": {2: 50}}, "E_CTX: row 2"),
    ({"q": [3, 3, 3]}, "E_TOKENS: batch: T=9 > Tcap="),
    # wide numbers do not wrap into good ones
    (wide("q", 2**32 + 1), "E_QLEN: row 1: q=4294967297 > Qcap=3"),
    (wide("ctx", 2**32 + 5), "E_CTX: row 1: ctx=4294967301 > Lmax=48"),
    (wide("ctx", -(2**63)), "E_CTX: row 1: ctx=-9223372036854775808 < 0"),
    (wide("slot", 2**32 + 1), "E_SLOT: row 1: slot=4294967297 not in [0, 4)"),
    (wide("block_table", 2**32 + 4), "E_BLOCK: row 1: block_table[0]=4294967300 not in [0, 32)"),
    (wide("q", 2**64 - 1, np.uint64), "E_QLEN: row 1: q=18446744073709551615 > Qcap=3"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=str)
def test_refusals(changes: dict[str, Any], text: str) -> None:
    error = refuse(error_config(), *changed(**changes))
    assert str(error).startswith(f"v4_prepare: {text}")
    code, where = text.split(": ")[:2]
    assert (error.code, error.row) == (code, -1 if where == "batch" else int(where[4:]))


def test_what_idle_rows_hold_is_ignored() -> None:
    idle = changed(q={1: 0}, ctx={1: 40}, slot={1: 0}, block_table={1: [-1, 99, -5]})
    out = v4_prepare_np(error_config(), *idle)
    assert out.cu_q.tolist() == [0, 1, 1, 2]
    # an idle row keeps its ctx
    assert out.ctx.tolist() == [5, 40, 5]
    # its lengths are checked all the same
    assert refuse(error_config(), *changed(q={1: 0}, ctx={1: 49})).code == "E_CTX"


def test_arrays_of_another_configuration_are_refused() -> None:
    cfg = config_of(CASES["G1"]["config"])
    other = V4Arrays(replace(cfg, index_topk=2))
    with pytest.raises(ValueError, match=r"out: got arrays of .*index_topk=2"):
        v4_prepare_np(cfg, *inputs_of(CASES["G1"]), other)


def first_fault(
    cfg: V4PrepareConfig, ctx: list[int], q: list[int], slot: list[int], table: list[list[int]]
) -> tuple[str, int] | None:
    """Code and row of the first broken rule, written down once more."""
    taken: set[int] = set()
    for row, (length, new, owner) in enumerate(zip(ctx, q, slot, strict=True)):
        if not 0 <= new <= cfg.max_tokens_per_seq:
            return "E_QLEN", row
        if length < max(0, new) or length > cfg.max_model_len:
            return "E_CTX", row
        if new and (owner in taken or not 0 <= owner < cfg.num_slots):
            return "E_SLOT", row
        if new:
            taken.add(owner)
            blocks = [
                table[row][p // cfg.block_size : p // cfg.block_size + 1] for p in range(length)
            ]
            if [] in blocks:
                return "E_TABLE", row
            if not all(0 <= block[0] < cfg.num_blocks for block in blocks):
                return "E_BLOCK", row
    return ("E_TOKENS", -1) if sum(q) > cfg.max_num_tokens else None


@examples(250, in_soak=500)
@given(made=steps(), data=st.data())
def test_any_change_is_judged_by_the_rules(
    made: tuple[V4PrepareConfig, Step], data: st.DataObject
) -> None:
    cfg, step = made
    inputs = [array.astype(np.int64) for array in step.arrays()]
    near = [-1, 0, 1, 2, cfg.max_model_len, cfg.num_slots, cfg.num_blocks, 2**31]
    for _ in range(data.draw(st.integers(0, 3))):
        array = data.draw(st.sampled_from(inputs))
        if array.size:
            at = data.draw(st.integers(0, array.size - 1))
            delta = data.draw(st.sampled_from([-1, 1, 0]))
            array.flat[at] = data.draw(st.sampled_from([*near, int(array.flat[at])])) + delta
    cut = data.draw(st.integers(0, inputs[3].shape[1]))
    inputs[3] = inputs[3][:, :cut] if data.draw(st.booleans()) else inputs[3]
    expected = first_fault(cfg, *(array.tolist() for array in inputs))
    if expected is None:
        v4_prepare_np(cfg, *inputs)
    else:
        error = refuse(cfg, *inputs)
        assert (error.code, error.row) == expected
