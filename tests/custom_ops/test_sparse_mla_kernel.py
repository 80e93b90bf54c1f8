"""The kernels of sparse MLA through their C ABI on a GPU, against sums in doubles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.ops.mla.custom_op import (
    CustomAttention,
    NarrowAttention,
    WideAttention,
    difference,
)
from tests.custom_ops.adoption import memory_of_a_gpu
from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import RANK, SCALE, Case, make, widened

FP8 = "fp8_ds_mla"
CACHES = [FP8, "bfloat16"]
Kind = type[CustomAttention]


def of_both(narrow: list[tuple[Any, ...]], wide: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Cases of each kernel: few heads over records, many over either cache."""
    few = [(NarrowAttention, FP8, *case) for case in narrow]
    return few + [(WideAttention, cache, *case) for cache in CACHES for case in wide]


FORMS = of_both([(8,), (16,), (32,)], [(64,)])

kernel_memory = memory_of_a_gpu


def run(
    m: KernelMemory, kind: Kind, case: Case, dtype: str = "float32", splits: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What a kernel writes to poisoned memory."""
    num_tokens, num_heads, _ = case.q.shape
    out = m.poisoned((num_tokens, num_heads, RANK), dtype)
    lse = m.poisoned((num_tokens, num_heads), "float32")
    attend = kind(custom_ops.build().kernels)
    attend(*case.inputs(m), out, softmax_scale=case.scale, lse=lse, splits=splits)
    return m.get(out), m.get(lse)


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads", "counts"),
    of_both(
        [
            (1, [65, 0]),
            (7, [31, 32, 33]),
            (8, [64, 0]),
            (12, [0, 1, 63, 64, 65, 130]),
            (16, [129]),
            (17, [5, 300]),
            (32, [127, 129, 0]),
        ],
        [
            (33, [65, 0]),
            (64, [0, 1, 63, 64, 65]),
            (64, [127, 128, 129, 191, 192, 193]),
            (65, [70]),
            (128, [130, 0, 5]),
        ],
    ),
)
def test_heads_and_edges_of_tiles(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, counts: list[int]
) -> None:
    case = make(cache_dtype, counts, max(counts) + 3, heads=heads)
    case.check(*run(kernel_memory, kind, case))
    case.check(*run(kernel_memory, kind, case, splits=1))


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads", "splits"),
    of_both(
        [(heads, splits) for heads in (5, 16, 20) for splits in (1, 2, 3, 8, 16)],
        [(100, splits) for splits in (*range(9), 16)],
    ),
)
def test_splits(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, splits: int
) -> None:
    case = make(cache_dtype, [0, 64, 65, 300, 700, 1], 700, heads=heads)
    case.check(*run(kernel_memory, kind, case, splits=splits))


@pytest.mark.parametrize(
    ("kind", "cache_dtype", "heads", "tokens"),
    of_both(
        [(heads, tokens) for heads in (8, 16, 32) for tokens in (1, 8, 140, 300)],
        [(64, 1), (128, 8), (64, 140), (128, 70)],
    ),
)
def test_rows_of_serving(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, tokens: int
) -> None:
    if not kernel_memory.large:
        pytest.skip("a size for a GPU")
    counts = [max(2048 - 9 * t, 0) for t in range(tokens)]
    case = make(cache_dtype, counts, 2048, heads=heads, num_slots=4096)
    case.check(*run(kernel_memory, kind, case))


@pytest.mark.parametrize(("kind", "cache_dtype", "heads"), FORMS)
@pytest.mark.parametrize("splits", [0, 1, 2])
def test_slots_without_a_place_are_skipped_anywhere(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int, splits: int
) -> None:
    case = make(cache_dtype, [640] * 5, 640, heads=heads, num_slots=1024)
    case.slots[0, [0, 1, 63, 64, 139]] = -1
    case.slots[1, :65] = [-1, -(2**31), 2**31 - 1, len(case.latents), -5] * 13
    case.slots[2, 10:] = len(case.latents)
    # whole tiles of none: more than are copied ahead, before, between and behind keys
    case.slots[3, :500], case.slots[4, 40:600] = -1, -1
    case.check(*run(kernel_memory, kind, case, splits=splits))


@pytest.mark.parametrize(("kind", "cache_dtype", "heads"), FORMS)
def test_bfloat16_is_the_float32_result_rounded(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int
) -> None:
    case = make(cache_dtype, [100, 0], 100, heads=heads)
    for splits in (1, 2):
        found, lse = run(kernel_memory, kind, case, "bfloat16", splits)
        whole, wanted = run(kernel_memory, kind, case, splits=splits)
        assert (np.abs(widened(found) - whole) <= 2.0**-8 * np.abs(whole)).all()
        np.testing.assert_array_equal(lse, wanted)


@pytest.mark.parametrize(("kind", "cache_dtype", "heads"), [*FORMS, (WideAttention, FP8, 128)])
def test_same_bits_every_time(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int
) -> None:
    case = make(cache_dtype, [500, 77] * 70, 500, heads=heads, num_slots=1024)
    for splits in (1, 2, 8):
        first = run(kernel_memory, kind, case, splits=splits)
        for _ in range(3):
            again = run(kernel_memory, kind, case, splits=splits)
            for one, other in zip(first, again, strict=True):
                np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize(("kind", "cache_dtype", "heads"), FORMS)
def test_scores_far_from_zero(
    kernel_memory: KernelMemory, kind: Kind, cache_dtype: str, heads: int
) -> None:
    # scores that grow tile by tile: the base of the exponentials moves again and again
    case = make(cache_dtype, [640], 640, heads=heads, num_slots=1024)
    case.scale = 3.0
    slots = case.slots[0]
    order = np.argsort((case.q[0, 0] * case.latents[slots]).sum(axis=1))
    case.slots[0] = slots[order]
    case.check(*run(kernel_memory, kind, case, splits=1))


@pytest.mark.parametrize(
    ("kind", "heads"),
    [*((NarrowAttention, heads) for heads in (2, 12, 20)), (WideAttention, 64)],
)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_selected_code_that_is_no_number_spoils_its_own_rows(
    kernel_memory: KernelMemory, kind: Kind, heads: int, code: int
) -> None:
    case = make(FP8, [5, 5], 5, heads=heads)
    case.slots[1] = np.setdiff1d(case.slots, case.slots[0])[-1]
    case.cache[case.slots[0, 3], 400] = code
    found, lse = run(kernel_memory, kind, case)
    assert np.isnan(found[0]).all() and np.isnan(lse[0]).all()
    case.slots, case.q = case.slots[1:], case.q[1:]
    case.check(found[1:], lse[1:])


@pytest.mark.parametrize(
    ("kind", "heads"),
    [*((NarrowAttention, heads) for heads in (3, 12, 20)), (WideAttention, 64)],
)
@pytest.mark.parametrize("power", [-60, 60])
def test_queries_outside_the_range_of_float16(
    kernel_memory: KernelMemory, kind: Kind, heads: int, power: int
) -> None:
    case = make(FP8, [70], 70, heads=heads)
    case.move_queries(power)
    case.scale = 2.0**-power * SCALE if power > 0 else SCALE
    case.check(*run(kernel_memory, kind, case))


@pytest.mark.parametrize("heads", [3, 12, 20])
@pytest.mark.parametrize("power", [-100, 30, 100])
def test_scales_outside_the_range_of_float16(
    kernel_memory: KernelMemory, power: int, heads: int
) -> None:
    case = make(FP8, [200], 200, heads=heads)
    case.scale_records(2.0**power)
    case.scale = SCALE * min(1.0, 2.0**-power)
    found, _ = run(kernel_memory, NarrowAttention, case)
    exact = case.exact(0)
    assert np.linalg.norm(found[0] - exact) < 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("kind", [NarrowAttention, WideAttention])
def test_it_serves_where_it_agrees(kernel_memory: KernelMemory, kind: Kind) -> None:
    assert not difference(kind, custom_ops.build().kernels, kernel_memory.poisoned)
