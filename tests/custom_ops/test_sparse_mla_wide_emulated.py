"""The CUDA source of sparse MLA for blocks of 64 heads, its threads emulated on the CPU."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from fd_dsa.ops.mla.custom_op import SparseMla
from tests.custom_ops.emulated_mla import EVERY_LANE, Arrays, aligned, library
from tests.ops.tensor_core_case import RANK, Case, make, widened
from tests.ops.test_dequantize import expected

FP8, BFLOAT16 = "fp8_ds_mla", "bfloat16"
BLOCK = 64


def run(
    case: Case, splits: int, is_bfloat16: bool = False, define: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Result and logarithms in memory that held NaN."""
    arrays = Arrays(case, is_bfloat16)
    assert library(define).sparse_mla_wide_emulated(ctypes.byref(arrays.job(splits))) == 0
    return arrays.out, arrays.lse


@pytest.mark.parametrize(
    ("cache", "heads", "splits", "counts"),
    [
        (FP8, 64, 1, [0, 1, 63, 64, 65]),
        (BFLOAT16, 33, 1, [127, 129]),
        (FP8, 70, 1, [192]),
        (BFLOAT16, 128, 2, [130, 0]),
        (FP8, 64, 3, [200]),
        (BFLOAT16, 48, 4, [65, 256]),
        (FP8, 17, 5, [321]),
        (BFLOAT16, 64, 6, [390]),
        (FP8, 40, 7, [450]),
        (BFLOAT16, 64, 8, [500]),
        (FP8, 64, 16, [520]),
        (BFLOAT16, 64, 0, [300]),
    ],
)
def test_heads_splits_and_edges_of_tiles(
    cache: str, heads: int, splits: int, counts: list[int]
) -> None:
    case = make(cache, counts, max(counts) + 3, heads=heads, num_slots=512)
    case.check(*run(case, splits))


@pytest.mark.parametrize(("cache", "splits"), [(FP8, 1), (BFLOAT16, 1), (FP8, 2), (BFLOAT16, 3)])
def test_slots_without_a_place_are_skipped_anywhere(cache: str, splits: int) -> None:
    case = make(cache, [330, 330, 330], 330, heads=64, num_slots=512)
    case.slots[0, 20:320] = -1
    case.slots[1, :300] = [-1, -(2**31), 2**31 - 1, len(case.latents), -5] * 60
    case.slots[2, [0, 1, 63, 64, 139]] = -1
    case.check(*run(case, splits))


@pytest.mark.parametrize(("cache", "splits"), [(FP8, 1), (BFLOAT16, 1), (FP8, 5)])
def test_bfloat16_is_the_float32_result_rounded(cache: str, splits: int) -> None:
    case = make(cache, [100, 0], 100, heads=41)
    (found, lse), (whole, wanted) = run(case, splits, True), run(case, splits)
    assert (np.abs(widened(found) - whole) <= 2.0**-8 * np.abs(whole)).all()
    np.testing.assert_array_equal(lse, wanted)


@pytest.mark.parametrize("cache", [FP8, BFLOAT16])
def test_scores_that_grow_from_tile_to_tile(cache: str) -> None:
    case = make(cache, [400], 400, heads=64, num_slots=512)
    case.scale = 3.0
    slots = case.slots[0]
    case.slots[0] = slots[np.argsort((case.q[0, 0] * case.latents[slots]).sum(axis=1))]
    case.check(*run(case, 1))


@pytest.mark.parametrize("power", [-60, 60])
def test_queries_outside_the_range_of_float16(power: int) -> None:
    case = make(FP8, [70], 70, heads=64)
    case.move_queries(power)
    case.scale *= 2.0**-power if power > 0 else 1.0
    case.check(*run(case, 1))


def test_a_selected_code_that_is_no_number_spoils_its_own_rows() -> None:
    case = make(FP8, [5, 5], 5, heads=64)
    case.slots[1] = np.setdiff1d(case.slots, case.slots[0])[-1]
    case.cache[case.slots[0, 3], 400] = 0x7F
    found, lse = run(case, 1)
    assert np.isnan(found[0]).all() and np.isnan(lse[0]).all()
    case.slots, case.q = case.slots[1:], case.q[1:]
    case.check(found[1:], lse[1:])


@pytest.mark.parametrize(("cache", "splits"), [(FP8, 1), (BFLOAT16, 3)])
def test_the_same_bits_in_any_order_of_threads(cache: str, splits: int) -> None:
    case = make(cache, [300], 300, heads=64)
    first, again = run(case, splits), run(case, splits)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize(("cache", "splits"), [(FP8, 1), (BFLOAT16, 2)])
def test_each_lane_may_arrive_by_itself(cache: str, splits: int) -> None:
    case = make(cache, [200], 200, heads=64)
    case.check(*run(case, splits, define=EVERY_LANE))


class Prompts:
    """A case whose records lie elsewhere, too: those of the rows that are named.

    Args:
        case: over records; each token is a row of its own.
        rows: that were dequantized.
        seed: of the order of the blocks there.
    """

    def __init__(self, case: Case, rows: list[int], seed: int = 0) -> None:
        self.arrays, num_blocks = Arrays(case), len(case.latents) // BLOCK
        self.blocks = np.random.default_rng(seed).permutation(num_blocks).astype(np.int32)
        values = np.empty((num_blocks, BLOCK, RANK + 64), np.uint16)
        values[self.blocks] = expected(case.cache).reshape(values.shape)
        self.values, num_tokens = aligned(values), len(case.slots)
        self.flags = np.isin(np.arange(num_tokens), rows).astype(np.int32)
        self.ids = np.arange(num_tokens, dtype=np.int32)

    def run(self, splits: int) -> tuple[np.ndarray, np.ndarray]:
        """As `run`."""
        assert library().sparse_mla_wide_emulated(ctypes.byref(self.job(splits))) == 0
        return self.arrays.out, self.arrays.lse

    def job(self, splits: int) -> SparseMla:
        """The structure of a launch; as long as this object lives."""
        job = self.arrays.job(splits)
        job.dequantized, job.dequantized_blocks = self.values.ctypes.data, self.blocks.ctypes.data
        job.is_dequantized, job.batch_id_per_token = self.flags.ctypes.data, self.ids.ctypes.data
        job.num_rows, job.block_size = len(self.flags), BLOCK
        job.dequantized_slots = self.values.shape[0] * BLOCK
        return job


@pytest.mark.parametrize(("heads", "splits"), [(64, 1), (70, 1), (40, 3)])
def test_what_was_dequantized_gives_the_same_bits(heads: int, splits: int) -> None:
    case = make(FP8, [130, 65, 0], 140, heads=heads, num_slots=256)
    found = Prompts(case, [0, 2]).run(splits)
    case.check(*found)
    for one, other in zip(found, run(case, splits), strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def test_records_are_read_of_rows_that_were_not_dequantized() -> None:
    case = make(FP8, [70, 70, 70, 70], 70, heads=64, num_slots=256)
    prompts = Prompts(case, [0, 1, 2, 3])
    # no row at all, and flags of another one
    prompts.ids[:2], prompts.flags[2] = [-1, 4], 0
    prompts.values[...] = 0
    found, lse = prompts.run(1)
    assert not found[3].any()
    case.slots, case.q = case.slots[:3], case.q[:3]
    case.check(found[:3], lse[:3])


def test_places_that_are_none_are_skipped() -> None:
    case = make(FP8, [90], 90, heads=64, num_slots=256)
    prompts = Prompts(case, [0])
    lost = [1, 3]
    prompts.blocks[lost] = [-1, len(prompts.blocks)]
    found = prompts.run(1)
    case.slots[np.isin(case.slots // BLOCK, lost)] = -1
    case.check(*found)


@pytest.mark.parametrize(
    ("cache", "heads", "is_bfloat16"),
    [(FP8, 64, True), (BFLOAT16, 40, False), (BFLOAT16, 70, True)],
)
def test_two_launches_give_what_one_gives(cache: str, heads: int, is_bfloat16: bool) -> None:
    case = make(cache, [70, 0, 33], 70, heads=heads)
    arrays = Arrays(case, is_bfloat16)
    job = arrays.job(0)
    assert library().sparse_mla_wide_in_two(ctypes.byref(job), 2, 1, 2) == 0
    wanted = [run(case, splits, is_bfloat16) for splits in (1, 2)]
    for k, found in enumerate((arrays.out, arrays.lse)):
        np.testing.assert_array_equal(found[:2], wanted[0][k][:2])
        np.testing.assert_array_equal(found[2:], wanted[1][k][2:])


def test_a_second_launch_knows_the_rows_of_its_tokens() -> None:
    case = make(FP8, [30, 40], 40, heads=64, num_slots=256)
    prompts = Prompts(case, [1])
    # whose records are not read any more
    broken = case.cache[case.slots[1]].copy()
    case.cache[case.slots[1]] = 0xFF
    prompts.arrays = Arrays(case)
    job = prompts.job(0)
    assert library().sparse_mla_wide_in_two(ctypes.byref(job), 1, 1, 1) == 0
    case.cache[case.slots[1]] = broken
    case.slots, case.q = case.slots[1:], case.q[1:]
    case.check(prompts.arrays.out[1:], prompts.arrays.lse[1:])


@pytest.mark.parametrize(
    ("tokens", "groups", "plan"),
    [
        (1, 1, (1, 16, 0, 0)),
        (16, 1, (16, 8, 0, 0)),
        (64, 1, (64, 2, 0, 0)),
        (128, 1, (128, 1, 0, 0)),
        (132, 1, (132, 1, 0, 0)),
        (140, 1, (132, 1, 8, 16)),
        (176, 1, (132, 1, 44, 3)),
        (256, 1, (256, 1, 0, 0)),
        (300, 1, (264, 1, 36, 3)),
        (70, 2, (66, 1, 4, 16)),
        (2046, 2, (2046, 1, 0, 0)),
    ],
)
def test_tokens_that_do_not_fill_the_device_whole_times(
    tokens: int, groups: int, plan: tuple[int, ...]
) -> None:
    found = (ctypes.c_int * 4)()
    library().sparse_mla_wide_plan(tokens, groups, 2048, 132, found)
    assert tuple(found) == plan


@pytest.mark.parametrize("topk", [0, 1, 64, 65, 2048])
def test_every_token_is_in_one_launch(topk: int) -> None:
    found = (ctypes.c_int * 4)()
    for tokens in range(1, 700):
        for groups, blocks in ((1, 132), (2, 132), (3, 20), (5, 4)):
            library().sparse_mla_wide_plan(tokens, groups, topk, blocks, found)
            first, splits, rest, of_rest = found
            assert first > 0 and rest >= 0 and first + rest == tokens
            for part, number in ((first, splits), (rest, of_rest)):
                least_tiles = max(1, -(-topk // 64))
                assert part == 0 or 1 <= number <= min(least_tiles, blocks)


@pytest.mark.parametrize("splits", [-1, 9, 12, 17])
def test_what_the_launcher_refuses(splits: int) -> None:
    job = SparseMla(num_tokens=1, num_heads=64, is_fp8=1, splits=splits)
    assert library().sparse_mla_wide_emulated(ctypes.byref(job)) != 0
