"""The host builder against the worked examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Arrays, csa_translate, fused_list, v4_prepare_np
from tests.v4_prepare.golden import (
    CASES,
    assert_hca_tokens,
    assert_outputs,
    config_of,
    inputs_of,
)

GARBAGE = (-1, 0, 77, -(2**31), 2**31 - 1)


def as_arrays(dtype: str) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A converter of all four inputs."""

    def convert(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # what nobody reads is -1; an unsigned array holds its largest number there
        return tuple(np.array(one, np.int64).astype(dtype) for one in inputs)

    return convert


def poisoned(cfg: Any, value: int) -> V4Arrays:
    """Arrays that hold garbage."""
    out = V4Arrays.allocate(cfg)
    for name in OUTPUT_SHAPES(cfg):
        getattr(out, name).fill(value)
    return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_every_output_is_that_of_the_example(name: str, garbage: int) -> None:
    case = CASES[name]
    cfg = config_of(case["config"])
    out = poisoned(cfg, garbage)
    assert v4_prepare_np(cfg, *inputs_of(case), out) is out
    assert_outputs(case, lambda field: getattr(out, field))
    if "out_compact" in case:
        assert_hca_tokens(case, out.hca_indptr, out.hca_idx)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "uint64", ">i4"])
def test_inputs_of_any_integer_dtype(name: str, dtype: str) -> None:
    case = CASES[name]
    cfg = config_of(case["config"])
    out = v4_prepare_np(cfg, *as_arrays(dtype)(inputs_of(case)))
    assert_outputs(case, lambda field: getattr(out, field))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_bytes_do_not_wrap(dtype: str) -> None:
    """Rows of the pools lie beyond what the inputs' own dtype holds."""
    case = CASES["G8"]
    cfg = config_of(case["config"])
    out = v4_prepare_np(cfg, *as_arrays(dtype)(inputs_of(case)))
    assert_outputs(case, lambda field: getattr(out, field))


@pytest.mark.parametrize("name", CASES)
def test_table_mode_leaves_the_list_out_and_nothing_else(name: str) -> None:
    case = CASES[name]
    cfg = replace(config_of(case["config"]), hca_mode="table")
    out = v4_prepare_np(cfg, *inputs_of(case))
    assert out.hca_idx is None
    assert_outputs(case, lambda field: getattr(out, field))


@pytest.mark.parametrize("name", CASES)
def test_more_columns_than_needed_change_nothing(name: str) -> None:
    case = CASES[name]
    cfg = config_of(case["config"])
    *lengths, table = inputs_of(case)
    wide = np.full((len(table), cfg.max_blocks_per_seq + 3), -7, np.int32)
    for row, blocks in enumerate(table):
        wide[row, : len(blocks)] = blocks
    # strided inputs are as good as dense ones
    out = v4_prepare_np(cfg, *lengths, np.asfortranarray(wide))
    assert_outputs(case, lambda field: getattr(out, field))


@pytest.mark.parametrize(("name", "kind"), [("G1", "hca"), ("G1", "csa"), ("G2", "hca")])
def test_fused_lists(name: str, kind: str) -> None:
    case = CASES[name]
    out = v4_prepare_np(config_of(case["config"]), *inputs_of(case))
    indptr, rows = fused_list(out, kind)  # type: ignore[arg-type]
    assert indptr.tolist() == case["out"][f"fused_{kind}_indptr"]
    assert rows.tolist() == case["out"][f"fused_{kind}_idx"]
    assert indptr.dtype == rows.dtype == np.int32


def test_chosen_entries_become_rows() -> None:
    case = CASES["G2"]
    inputs = inputs_of(case)
    out = v4_prepare_np(config_of(case["config"]), *inputs)
    rows = csa_translate(out, inputs[3], case["csa_translate"]["local_topk"])
    assert rows.dtype == np.int32
    assert rows.tolist() == case["csa_translate"]["rows"]
