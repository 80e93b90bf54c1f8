"""The CUDA source of sparse MLA for few heads, its threads emulated on the CPU, against doubles."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from fd_dsa.ops.mla.custom_op import SparseMla
from tests.custom_ops.emulated_mla import EVERY_LANE, Arrays, library
from tests.ops.tensor_core_case import Case, make

ONE, TAKE_TURNS, WARPGROUPS, CHOSEN = 0, 1, 2, -1


def run(case: Case, form: int, splits: int, define: str = "") -> tuple[np.ndarray, np.ndarray]:
    """float32 result and logarithms in memory that held NaN."""
    arrays = Arrays(case)
    job = arrays.job(splits)
    assert library(define).sparse_mla_emulated(ctypes.byref(job), form) == 0
    return arrays.out, arrays.lse


@pytest.mark.parametrize(
    ("heads", "form", "splits", "counts"),
    [
        (1, ONE, 1, [65, 0]),
        (8, ONE, 2, [300]),
        (6, ONE, 1, [63, 130, 1]),
        (8, TAKE_TURNS, 1, [200]),
        (7, TAKE_TURNS, 1, [200, 63]),
        (8, TAKE_TURNS, 3, [700]),
        (5, TAKE_TURNS, 16, [1, 0, 128]),
        (11, WARPGROUPS, 1, [129, 0, 1]),
        (9, WARPGROUPS, 3, [700]),
        (16, WARPGROUPS, 16, [1, 0, 128]),
        (17, WARPGROUPS, 1, [63, 64, 65]),
        (32, WARPGROUPS, 5, [450]),
        (5, CHOSEN, 0, [200]),
        (12, CHOSEN, 0, [200]),
        (20, CHOSEN, 0, [200]),
    ],
)
def test_forms(heads: int, form: int, splits: int, counts: list[int]) -> None:
    case = make("fp8_ds_mla", counts, max(counts) + 3, heads=heads)
    case.check(*run(case, form, splits))


@pytest.mark.parametrize(
    ("heads", "form", "splits"),
    [(3, ONE, 1), (8, TAKE_TURNS, 1), (9, WARPGROUPS, 1), (20, WARPGROUPS, 2)],
)
def test_slots_without_a_place_are_skipped_anywhere(heads: int, form: int, splits: int) -> None:
    case = make("fp8_ds_mla", [640, 640], 640, heads=heads)
    # whole tiles of none, more than are copied ahead: behind, between and before keys
    case.slots[0, 20:630] = -1
    case.slots[1, :600] = [-1, -(2**31), 2**31 - 1, len(case.latents), -5] * 120
    case.slots[1, [610, 639]] = -1
    case.check(*run(case, form, splits))


@pytest.mark.parametrize(("heads", "form"), [(8, TAKE_TURNS), (16, WARPGROUPS), (32, WARPGROUPS)])
@pytest.mark.parametrize("empty", [0, 1])
def test_a_warpgroup_may_be_far_ahead_of_the_other(heads: int, form: int, empty: int) -> None:
    case = make("fp8_ds_mla", [500], 500, heads=heads)
    # one of the two finds no key in any of its tiles
    case.slots[:, np.arange(500) // 64 % 2 == empty] = -1
    case.check(*run(case, form, 1))


@pytest.mark.parametrize(("heads", "form"), [(8, TAKE_TURNS), (16, WARPGROUPS), (20, WARPGROUPS)])
@pytest.mark.parametrize("growth", [0, 1, 3])
def test_scores_and_scales_that_grow_from_tile_to_tile(heads: int, form: int, growth: int) -> None:
    case = make("fp8_ds_mla", [330], 330, heads=heads, num_slots=512)
    case.scale = 3.0 * 2.0 ** -(5 * growth)
    slots = case.slots[0]
    case.slots[0] = slots[np.argsort((case.q[0, 0] * case.latents[slots]).sum(axis=1))]
    factors = np.ones(len(case.latents))
    factors[case.slots[0]] = 2.0 ** (growth * (np.arange(330) // 64))
    case.scale_records(factors)
    found, lse = run(case, form, 1)
    if growth == 0:
        case.check(found, lse)
    else:
        # weights beside the largest scale may be too small for float16, as the bound has it not
        exact = case.exact(0)
        assert np.linalg.norm(found[0] - exact) < 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize(("heads", "form"), [(3, ONE), (12, WARPGROUPS), (20, WARPGROUPS)])
@pytest.mark.parametrize("power", [-100, 30, 100])
def test_scales_outside_the_range_of_float16(heads: int, form: int, power: int) -> None:
    case = make("fp8_ds_mla", [200], 200, heads=heads)
    case.scale_records(2.0**power)
    case.scale *= min(1.0, 2.0**-power)
    found, _ = run(case, form, 1)
    exact = case.exact(0)
    assert np.linalg.norm(found[0] - exact) < 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize(("heads", "form"), [(3, ONE), (12, WARPGROUPS), (20, WARPGROUPS)])
@pytest.mark.parametrize("power", [-60, 60])
def test_queries_outside_the_range_of_float16(heads: int, form: int, power: int) -> None:
    case = make("fp8_ds_mla", [70], 70, heads=heads)
    case.move_queries(power)
    case.scale *= 2.0**-power if power > 0 else 1.0
    case.check(*run(case, form, 1))


@pytest.mark.parametrize(("heads", "form"), [(2, ONE), (16, WARPGROUPS), (17, WARPGROUPS)])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_selected_code_that_is_no_number_spoils_its_own_rows(
    heads: int, form: int, code: int
) -> None:
    case = make("fp8_ds_mla", [5, 5], 5, heads=heads)
    case.slots[1] = np.setdiff1d(case.slots, case.slots[0])[-1]
    case.cache[case.slots[0, 3], 400] = code
    found, lse = run(case, form, 1)
    assert np.isnan(found[0]).all() and np.isnan(lse[0]).all()
    case.slots, case.q = case.slots[1:], case.q[1:]
    case.check(found[1:], lse[1:])


@pytest.mark.parametrize(("heads", "form"), [(7, TAKE_TURNS), (9, WARPGROUPS)])
def test_the_same_bits_in_any_order_of_threads(heads: int, form: int) -> None:
    case = make("fp8_ds_mla", [300], 300, heads=heads)
    first, again = run(case, form, 2), run(case, form, 2)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize(("heads", "form"), [(6, ONE), (8, TAKE_TURNS), (9, WARPGROUPS)])
def test_each_lane_may_arrive_by_itself(heads: int, form: int) -> None:
    case = make("fp8_ds_mla", [300], 300, heads=heads)
    case.check(*run(case, form, 2, EVERY_LANE))


@pytest.mark.parametrize(
    ("tokens", "topk", "splits"),
    [
        (1, 64, 1),
        (1, 2048, 16),
        (8, 2048, 8),
        (32, 2048, 4),
        (64, 2048, 2),
        (128, 2048, 1),
        (5000, 2048, 1),
    ],
)
def test_few_tokens_are_split(tokens: int, topk: int, splits: int) -> None:
    assert library().sparse_mla_splits(tokens, topk, 132) == splits
    assert library().sparse_mla_splits(tokens, 0, 132) == 1


@pytest.mark.parametrize(
    "change", [{"num_heads": 33}, {"is_fp8": 0}, {"splits": 17}, {"splits": -1}]
)
def test_what_the_launcher_refuses(change: dict[str, int]) -> None:
    given = {"num_tokens": 1, "num_heads": 8, "is_fp8": 1} | change
    assert library().sparse_mla_emulated(ctypes.byref(SparseMla(**given)), CHOSEN) != 0
