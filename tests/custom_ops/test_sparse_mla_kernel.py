"""The kernels of sparse MLA through their C ABI, against sums in doubles.

On a GPU, and on the CPU with emulated threads, where copies and products happen early or late:
barriers and votes are in place, so most mistakes show without a GPU; those of memory ordering and
of real sizes do not.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from fd_dsa.ops.mla.custom_op import (
    CustomAttention,
    NarrowAttention,
    SparseMla,
    WideAttention,
)
from fd_dsa.ops.providers import CUSTOM_OP
from tests.custom_ops.building import emulated_library
from tests.custom_ops.mla import InTwo, assert_same_bits, emulated, run
from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import RANK, SCALE, Case, make, widened

KERNELS = "sparse_mla"
FP8, BFLOAT16 = "fp8_ds_mla", "bfloat16"
Kind = type[CustomAttention]


def few(*cases: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Cases of the kernel for few heads over records. Up to 8 heads, of 5 tokens and more: in two
    warpgroups; from 9 heads on: in products of warpgroups."""
    return [(NarrowAttention, FP8, *case) for case in cases]


def many(cache: str, *cases: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Cases of the kernel for blocks of 64 heads."""
    return [(WideAttention, cache, *case) for case in cases]


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads", "splits", "counts"),
    [
        *few(
            (1, 1, [65, 0]),
            (5, 0, [200]),
            (5, 16, [1, 0, 128, 0, 0]),
            (6, 1, [63, 130, 1]),
            (7, 1, [200, 63, 31, 32, 33]),
            (8, 0, [64, 0]),
            (8, 2, [300]),
            (8, 3, [700, 0, 0, 0, 0]),
            (9, 3, [700]),
            (11, 1, [129, 0, 1]),
            (12, 0, [0, 1, 63, 64, 65, 130]),
            (16, 1, [129]),
            (16, 16, [1, 0, 128]),
            (17, 0, [5, 300]),
            (17, 1, [63, 64, 65]),
            (32, 1, [127, 129, 0]),
            (32, 5, [450]),
        ),
        *many(
            FP8,
            (17, 5, [321]),
            (40, 7, [450]),
            (64, 1, [0, 1, 63, 64, 65]),
            (64, 3, [200]),
            (64, 16, [520]),
            (70, 1, [192]),
        ),
        *many(
            BFLOAT16,
            (33, 1, [127, 129]),
            (48, 4, [65, 256]),
            (64, 0, [300]),
            (64, 6, [390]),
            (64, 8, [500]),
            (128, 2, [130, 0]),
        ),
    ],
)
def test_heads_splits_and_edges_of_tiles(
    kernel_memory: KernelMemory,
    kind: Kind,
    cache_dtype: str,
    heads: int,
    splits: int,
    counts: list[int],
) -> None:
    case = make(cache_dtype, counts, max(counts) + 3, heads=heads, num_slots=512)
    case.check(*run(kernel_memory, kind, case, splits=splits))


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads"),
    [
        *few((5,), (7,), (8,), (12,), (16,), (20,), (32,)),
        *(case for c in (FP8, BFLOAT16) for case in many(c, (33,), (64,), (65,), (100,), (128,))),
    ],
)
def test_all_splits(gpu_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int) -> None:
    counts = [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300, 700]
    case = make(cache_dtype, counts, 700, heads=heads)
    for splits in range(17) if kind is NarrowAttention else (*range(9), 16):
        case.check(*run(gpu_memory, kind, case, splits=splits))


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads", "tokens"),
    [
        *few(*((heads, tokens) for heads in (8, 16, 32) for tokens in (1, 8, 140, 300))),
        *many(FP8, (64, 1), (128, 8), (64, 140), (128, 70)),
        *many(BFLOAT16, (64, 1), (128, 8), (64, 140), (128, 70)),
    ],
)
def test_rows_of_serving(
    gpu_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, tokens: int
) -> None:
    if not gpu_memory.large:
        pytest.skip("sizes of serving")
    counts = [max(2048 - 9 * t, 0) for t in range(tokens)]
    case = make(cache_dtype, counts, 2048, heads=heads, num_slots=4096)
    case.check(*run(gpu_memory, kind, case))


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads", "splits"),
    [
        *few((3, 1), (8, 1), (9, 1), (16, 2), (20, 2), (32, 0)),
        *many(FP8, (64, 1), (64, 2)),
        *many(BFLOAT16, (64, 1), (64, 3)),
    ],
)
def test_slots_without_a_place_are_skipped_anywhere(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, splits: int
) -> None:
    num_tokens = 4 if heads < 8 else 5
    case = make(cache_dtype, [640] * num_tokens, 640, heads=heads, num_slots=1024)
    # whole tiles of none, more than are copied ahead: after, between and before keys
    case.slots[0, 20:630] = -1
    case.slots[1, :600] = [-1, -(2**31), 2**31 - 1, len(case.latents), -5] * 120
    case.slots[1, [610, 639]] = -1
    case.slots[2, 10:] = len(case.latents)
    case.slots[3, :500] = -1
    case.slots[4:] = -1
    case.slots[4:, [0, 1, 63, 64, 139]] = case.slots[3, 500:505]
    for number in {splits, 0, 1, 2} if kernel_memory.on_gpu else {splits}:
        case.check(*run(kernel_memory, kind, case, splits=number))


@pytest.mark.parametrize("heads", [8, 16, 32])
@pytest.mark.parametrize("empty", [0, 1])
def test_a_warpgroup_may_be_far_ahead_of_the_other(
    kernel_memory: KernelMemory, heads: int, empty: int
) -> None:
    case = make(FP8, [500, 0, 0, 0, 0], 500, heads=heads)
    # one of the two finds no key in any of its tiles
    case.slots[:, np.arange(500) // 64 % 2 == empty] = -1
    case.check(*run(kernel_memory, NarrowAttention, case, splits=1))


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads", "growth"),
    [
        *few(*((heads, growth) for heads in (8, 16, 20) for growth in (0, 1, 3))),
        *many(FP8, (64, 0)),
        *many(BFLOAT16, (64, 0)),
    ],
)
def test_scores_and_scales_that_grow_from_tile_to_tile(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, growth: int
) -> None:
    # the base of the exponentials moves again and again
    case = make(cache_dtype, [400, 0, 0, 0, 0], 400, heads=heads, num_slots=512)
    case.scale = 3.0 * 2.0 ** -(5 * growth)
    slots = case.slots[0]
    case.slots[0] = slots[np.argsort((case.q[0, 0] * case.latents[slots]).sum(axis=1))]
    if growth:
        factors = np.ones(len(case.latents))
        factors[case.slots[0]] = 2.0 ** (growth * (np.arange(400) // 64))
        case.scale_records(factors)
    result = run(kernel_memory, kind, case, splits=1)
    if growth:
        # weights beside the largest scale may be too small for float16, as the bound has it not
        assert_near(result, case)
    else:
        case.check(*result)


def assert_near(result: tuple[np.ndarray, np.ndarray], case: Case) -> None:
    """The first token's result, as a whole, where single numbers may be off more."""
    exact = case.exact(0)
    assert np.linalg.norm(result[0][0] - exact) < 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("heads", [3, 12, 20])
@pytest.mark.parametrize("power", [-100, 30, 100])
def test_scales_outside_the_range_of_float16(
    kernel_memory: KernelMemory, power: int, heads: int
) -> None:
    case = make(FP8, [200], 200, heads=heads)
    case.scale_records(2.0**power)
    case.scale = SCALE * min(1.0, 2.0**-power)
    assert_near(run(kernel_memory, NarrowAttention, case), case)


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads"), [*few((3,), (12,), (20,)), *many(FP8, (64,))]
)
@pytest.mark.parametrize("power", [-60, 60])
def test_queries_outside_the_range_of_float16(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, power: int
) -> None:
    case = make(cache_dtype, [70], 70, heads=heads)
    case.move_queries(power)
    case.scale = 2.0**-power * SCALE if power > 0 else SCALE
    case.check(*run(kernel_memory, kind, case, splits=1))


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads"), [*few((2,), (16,), (17,)), *many(FP8, (64,))]
)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_selected_code_that_is_no_number_spoils_its_own_rows(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, code: int
) -> None:
    case = make(cache_dtype, [5, 5], 5, heads=heads)
    case.slots[1] = np.setdiff1d(case.slots, case.slots[0])[-1]
    case.cache[case.slots[0, 3], 400] = code
    out, lse = run(kernel_memory, kind, case, splits=1)
    assert np.isnan(out[0]).all() and np.isnan(lse[0]).all()
    case.slots, case.q = case.slots[1:], case.q[1:]
    case.check(out[1:], lse[1:])


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads", "splits"),
    [
        *few((8, 1), (16, 2), (32, 1)),
        *many(FP8, (41, 1), (64, 5)),
        *many(BFLOAT16, (41, 1), (64, 2)),
    ],
)
def test_bfloat16_is_the_float32_result_rounded(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, splits: int
) -> None:
    case = make(cache_dtype, [100, 0], 100, heads=heads)
    narrow, lse = run(kernel_memory, kind, case, "bfloat16", splits)
    whole, wanted = run(kernel_memory, kind, case, splits=splits)
    assert (np.abs(widened(narrow) - whole) <= 2.0**-8 * np.abs(whole)).all()
    np.testing.assert_array_equal(lse, wanted)


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads"),
    [*few((7,), (16,), (32,)), *many(FP8, (64,), (128,)), *many(BFLOAT16, (64,))],
)
def test_same_bits_every_time(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int
) -> None:
    m = kernel_memory
    case = make(cache_dtype, [500, 77] * 70 if m.on_gpu else [300], 500, heads=heads)
    for splits in (1, 2, 8) if m.on_gpu else (2,):
        first = run(m, kind, case, splits=splits)
        for _ in range(3 if m.on_gpu else 1):
            assert_same_bits(first, run(m, kind, case, splits=splits))


@pytest.mark.parametrize(("heads", "cache_dtype"), [(5, FP8), (70, FP8)])
def test_it_serves_where_it_agrees(
    kernel_memory: KernelMemory, heads: int, cache_dtype: str
) -> None:
    from fd_dsa.ops.mla.tensor_core import select_attention

    types = "bfloat16", cache_dtype, RANK, 64, 90
    choice = select_attention("gpu", heads, *types, kernel_memory.poisoned)
    assert choice.provider == CUSTOM_OP, choice


# ---- what needs no GPU, and cannot be asked of one


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads"),
    [*few((6,), (8,), (9,)), *many(FP8, (64,)), *many(BFLOAT16, (64,))],
)
def test_each_lane_may_arrive_by_itself(
    emulated_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int
) -> None:
    """The form of the kernels that racecheck can follow."""
    case = make(cache_dtype, [300, 0, 0, 0, 0], 300, heads=heads)
    kernels = ctypes.CDLL(str(emulated_library(KERNELS, "FD_DSA_EVERY_LANE_ARRIVES")))
    case.check(*run(emulated_memory, kind, case, splits=2, kernels=kernels))


@pytest.mark.parametrize(
    ("cache_dtype", "heads", "dtype"),
    [(FP8, 64, "bfloat16"), (BFLOAT16, 40, "float32"), (BFLOAT16, 70, "bfloat16")],
)
def test_two_launches_give_what_one_gives(
    emulated_memory: KernelMemory, cache_dtype: str, heads: int, dtype: str
) -> None:
    case = make(cache_dtype, [70, 0, 33], 70, heads=heads)
    both = run(emulated_memory, WideAttention, case, dtype, kernels=InTwo(2, 1, 2))
    for part, splits in ((slice(2), 1), (slice(2, 3), 2)):
        alone = run(emulated_memory, WideAttention, case, dtype, splits)
        for one, other in zip(both, alone, strict=True):
            np.testing.assert_array_equal(one[part], other[part])


@pytest.mark.parametrize(
    ("launcher", "change"),
    [
        *(
            ("narrow", c)
            for c in ({"num_heads": 33}, {"is_fp8": 0}, {"splits": 17}, {"splits": -1})
        ),
        *(("wide", {"num_heads": 64, "splits": splits}) for splits in (-1, 9, 12, 17)),
    ],
)
def test_what_the_launcher_refuses(launcher: str, change: dict[str, int]) -> None:
    job = SparseMla(**{"num_tokens": 1, "num_heads": 8, "is_fp8": 1} | change)
    assert emulated()[f"fd_dsa_sparse_mla_{launcher}_cuda"](ctypes.byref(job), None) != 0


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
    assert emulated().sparse_mla_splits(tokens, topk, 132) == splits
    assert emulated().sparse_mla_splits(tokens, 0, 132) == 1


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
    parts = (ctypes.c_int * 4)()
    emulated().sparse_mla_wide_plan(tokens, groups, 2048, 132, parts)
    assert tuple(parts) == plan


@pytest.mark.parametrize("topk", [0, 1, 64, 65, 2048])
def test_every_token_is_in_one_launch(topk: int) -> None:
    parts = (ctypes.c_int * 4)()
    for tokens in range(1, 700):
        for groups, blocks in ((1, 132), (2, 132), (3, 20), (5, 4)):
            emulated().sparse_mla_wide_plan(tokens, groups, topk, blocks, parts)
            first, splits, rest, of_rest = parts
            assert first > 0 and rest >= 0 and first + rest == tokens
            for part, number in ((first, splits), (rest, of_rest)):
                least_tiles = max(1, -(-topk // 64))
                assert part == 0 or 1 <= number <= min(least_tiles, blocks)
