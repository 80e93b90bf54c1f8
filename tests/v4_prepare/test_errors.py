"""Refused steps: which error, with which text, and that nothing was written before it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.errors import FdDsaError, V4PrepareError
from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Arrays, V4PrepareConfig, v4_prepare_np
from tests.v4_prepare.golden import CASES, ERRORS, config_of, error_config, inputs_of
from tests.v4_prepare.strategies import V4Step, steps

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


@pytest.mark.parametrize("name", ERRORS)
def test_worked_refusals(name: str) -> None:
    case = ERRORS[name]
    for convert in (list, lambda one: np.array(one, np.int32), lambda one: np.array(one)):
        error = refuse(error_config(), *map(convert, inputs_of(case)))
        assert (error.code, error.row, str(error)) == (case["code"], case["row"], case["text"])


def test_the_good_step_is_good() -> None:
    assert v4_prepare_np(error_config(), *changed()).counts[1] == 3


def test_the_error_is_one_of_the_package_and_can_be_sent_on() -> None:
    error = refuse(error_config(), *changed(q={1: -1}))
    assert isinstance(error, FdDsaError) and isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.row) == (str(error), "E_QLEN", 1)


SHAPE_TEXT = "v4_prepare: E_SHAPE: batch: ctx, q, slot must be [B], block_table [B, MB]"


@pytest.mark.parametrize(
    "changes",
    [
        {"ctx": [5, 5]},
        {"q": [1, 1]},
        {"slot": [0, 1, 2, 3]},
        {"block_table": [[1, 2, 3]]},
        {"block_table": [1, 2, 3]},
        {"block_table": [[1], [2, 3], [4]]},
        {"block_table": [[[1]], [[2]], [[3]]]},
        {"ctx": [[5], [5], [5]]},
        {"ctx": [], "q": [], "slot": []},
        {"ctx": np.array(5)},
    ],
    ids=str,
)
def test_shapes(changes: dict[str, Any]) -> None:
    assert str(refuse(error_config(), *changed(**changes))) == SHAPE_TEXT


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ctx": [5.0, 5, 5]}, "ctx has dtype float64, must be an integer dtype"),
        ({"q": np.array([True] * 3)}, "q has dtype bool, must be an integer dtype"),
        ({"slot": ["a", "b", "c"]}, "slot has dtype <U1, must be an integer dtype"),
        (
            {"block_table": np.ones((3, 3), np.float16)},
            "block_table has dtype float16, must be an integer dtype",
        ),
        ({"q": [2**70, 1, 1]}, "q has dtype object, must be an integer dtype"),
        ({"ctx": None}, "ctx is a NoneType, must be a NumPy array of integers or a list"),
        ({"slot": range(3)}, "slot is a range, must be a NumPy array of integers or a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_dtypes(changes: dict[str, Any], text: str) -> None:
    error = refuse(error_config(), *changed(**changes))
    assert (error.code, error.row) == ("E_DTYPE", -1)
    assert str(error) == f"v4_prepare: E_DTYPE: batch: {text}"


# each line: a step with two faults, and the one that is named
ORDER = [
    ({"ctx": [5.0, 5.0], "q": [1, 1, 1]}, "E_SHAPE", -1),
    ({"ctx": [5.0] * 4, "q": [1] * 4, "slot": [0] * 4, "block_table": [[1]] * 4}, "E_DTYPE", -1),
    ({"ctx": [5] * 4, "q": [-1] * 4, "slot": [0] * 4, "block_table": [[1]] * 4}, "E_BATCH", -1),
    ({"q": {2: -1}, "ctx": {1: 49}}, "E_CTX", 1),
    ({"q": {1: 4}, "ctx": {1: -1}}, "E_QLEN", 1),
    ({"ctx": {1: 49}, "slot": {1: 9}}, "E_CTX", 1),
    ({"ctx": {1: 49}, "slot": {0: 9}}, "E_SLOT", 0),
    ({"slot": {1: 4}, "ctx": {1: 33}, "block_table": [[1], [4], [7]]}, "E_SLOT", 1),
    ({"slot": {2: 0}, "block_table": {1: [-1, 5, 6]}}, "E_BLOCK", 1),
    ({"ctx": {1: 33, 2: -1}, "block_table": [[1], [4], [7]]}, "E_TABLE", 1),
    ({"q": [3, 3, 3], "block_table": {2: [32, 5, 6]}}, "E_BLOCK", 2),
    ({"q": [3, 3, 3], "ctx": {2: 50}}, "E_CTX", 2),
    ({"q": [3, 3, 3]}, "E_TOKENS", -1),
]


@pytest.mark.parametrize(("changes", "code", "row"), ORDER, ids=str)
def test_order_of_the_checks(changes: dict[str, Any], code: str, row: int) -> None:
    error = refuse(error_config(), *changed(**changes))
    assert (error.code, error.row) == (code, row)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("q", 2**32 + 1, "E_QLEN: row 1: q=4294967297 > Qcap=3"),
        ("ctx", 2**32 + 5, "E_CTX: row 1: ctx=4294967301 > Lmax=48"),
        ("ctx", -(2**63), "E_CTX: row 1: ctx=-9223372036854775808 < 0"),
        ("slot", 2**32 + 1, "E_SLOT: row 1: slot=4294967297 not in [0, 4)"),
        ("block_table", 2**32 + 4, "E_BLOCK: row 1: block_table[0]=4294967300 not in [0, 32)"),
    ],
)
def test_wide_numbers_do_not_wrap_into_good_ones(name: str, value: int, text: str) -> None:
    inputs = [np.array(one, np.int64) for one in GOOD]
    inputs[FIELD[name]][(1, 0) if name == "block_table" else 1] = value
    assert str(refuse(error_config(), *inputs)) == f"v4_prepare: {text}"


def test_the_largest_unsigned_numbers_are_not_negative_ones() -> None:
    inputs = [np.array(one, np.uint64) for one in GOOD]
    inputs[1][0] = 2**64 - 1
    assert str(refuse(error_config(), *inputs)).endswith("q=18446744073709551615 > Qcap=3")


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


@settings(max_examples=500, deadline=None)
@given(step=steps(), data=st.data())
def test_any_change_is_judged_by_the_rules(step: V4Step, data: st.DataObject) -> None:
    inputs = [array.astype(np.int64) for array in step.inputs()]
    near = [-1, 0, 1, 2, step.cfg.max_model_len, step.cfg.num_slots, step.cfg.num_blocks, 2**31]
    for _ in range(data.draw(st.integers(0, 3))):
        array = data.draw(st.sampled_from(inputs))
        if array.size:
            at = data.draw(st.integers(0, array.size - 1))
            delta = data.draw(st.sampled_from([-1, 1, 0]))
            array.flat[at] = data.draw(st.sampled_from([*near, int(array.flat[at])])) + delta
    cut = data.draw(st.integers(0, inputs[3].shape[1]))
    inputs[3] = inputs[3][:, :cut] if data.draw(st.booleans()) else inputs[3]
    expected = first_fault(step.cfg, *(array.tolist() for array in inputs))
    if expected is None:
        v4_prepare_np(step.cfg, *inputs)
    else:
        error = refuse(step.cfg, *inputs)
        assert (error.code, error.row) == expected
