"""Sparse MLA on tensor cores against attention in doubles, at edges of tiles and splits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import RANK, make, widened

CACHES = ["fp8_ds_mla", "bfloat16"]


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize(
    ("heads", "counts"),
    [
        (1, [65, 0]),
        (8, [64, 0]),
        (12, [0, 1, 63, 64, 65, 130]),
        (16, [129]),
        (32, [127, 129, 0]),
        (64, [0, 64, 66]),
        (65, [70]),
    ],
)
def test_heads_and_edges_of_tiles(
    kernel_memory: KernelMemory, cache_dtype: str, heads: int, counts: list[int]
) -> None:
    case = make(cache_dtype, counts, max(counts) + 3, heads=heads)
    case.check(*case.run(kernel_memory))


@pytest.mark.parametrize(
    ("heads", "block_h", "swapped"), [(3, 16, True), (20, 32, True), (3, 16, False)]
)
def test_copied_keys(kernel_memory: KernelMemory, heads: int, block_h: int, swapped: bool) -> None:
    from fd_dsa.ops.mla.tensor_core import KernelConfig

    case = make("bfloat16", [0, 65, 130], 131, heads=heads)
    config = KernelConfig(True, block_h, 64, swapped, 4, 2, 1)
    case.check(*case.run(kernel_memory, config=config))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("splits", [2, 3])
def test_edges_of_splits(kernel_memory: KernelMemory, cache_dtype: str, splits: int) -> None:
    counts = [0, 64, 65, 128, 129, 180]
    case = make(cache_dtype, counts, 180, heads=1)
    found = case.run(kernel_memory, len(counts) * splits, splits=splits)
    case.check(*found)
    whole = case.run(kernel_memory)
    # weights are rounded beside another largest score: no further apart than two roundings
    np.testing.assert_allclose(found[0], whole[0], rtol=0, atol=2.0**-8 * np.abs(whole[0]).max())
    np.testing.assert_allclose(found[1], whole[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("heads", [3, 40])
def test_more_splits_than_tiles(kernel_memory: KernelMemory, heads: int) -> None:
    case = make("fp8_ds_mla", [66], 130, heads=heads)
    case.check(*case.run(kernel_memory, heads * 5, splits=5))


@pytest.mark.parametrize("cache_dtype", [*CACHES, "int16"])
def test_slots_without_a_place_are_skipped_anywhere(
    kernel_memory: KernelMemory, cache_dtype: str
) -> None:
    case = make(cache_dtype, [140, 140, 140], 140, heads=4)
    case.slots[0, [0, 1, 63, 64, 139]] = -1
    case.slots[1, :65] = [-1, -(2**31), 2**31 - 1, len(case.latents), -5] * 13
    case.slots[2, 10:] = len(case.latents)
    case.check(*case.run(kernel_memory))
    # and scores far from zero
    case.scale = 3.0 if cache_dtype != "fp8_ds_mla" else case.scale
    case.check(*case.run(kernel_memory, 3 * 4 * 2, splits=2))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("heads", [4, 40])
def test_rounds_where_it_says(kernel_memory: KernelMemory, cache_dtype: str, heads: int) -> None:
    case = make(cache_dtype, [50, 1], 50, heads=heads)
    found, _ = case.run(kernel_memory)
    rounded, exact = case.rounded(0), case.exact(0)
    # a sum in float32 may move a weight to the neighbouring number
    assert np.linalg.norm(found[0] - rounded) < 0.2 * np.linalg.norm(found[0] - exact)
    # of one key the weight is 1
    np.testing.assert_array_equal(found[1], case.rounded(1))


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_same_bits_every_time(kernel_memory: KernelMemory, cache_dtype: str) -> None:
    case = make(cache_dtype, [100], 100, heads=9)
    for rows, splits in ((0, 1), (18, 2)):
        first = case.run(kernel_memory, rows, splits=splits)
        again = case.run(kernel_memory, rows, splits=splits)
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_selected_code_that_is_no_number_spoils_its_own_rows(
    kernel_memory: KernelMemory, code: int
) -> None:
    case = make("fp8_ds_mla", [5, 5], 5, heads=2)
    case.slots[1] = np.setdiff1d(case.slots, case.slots[0])[-1]
    case.cache[case.slots[0, 3], 400] = code
    found, lse = case.run(kernel_memory)
    assert np.isnan(found[0]).all() and np.isnan(lse[0]).all()
    case.slots, case.q = case.slots[1:], case.q[1:]
    case.check(found[1:], lse[1:])


@pytest.mark.parametrize("power", [-60, 60])
def test_queries_outside_the_range_of_float16(kernel_memory: KernelMemory, power: int) -> None:
    case = make("fp8_ds_mla", [20], 20, heads=3)
    case.move_queries(power)
    case.scale *= 2.0**-power if power > 0 else 1.0
    case.check(*case.run(kernel_memory))


def test_tiny_and_large_scales(kernel_memory: KernelMemory) -> None:
    case = make("fp8_ds_mla", [12], 12, heads=2)
    chosen = case.selected(0)
    factors = np.float32([2.0**-8, 1, 2.0**-7, 2.0**5])
    scales = case.cache[chosen, RANK : RANK + 16].copy().view(np.float32) * factors
    case.cache[chosen, RANK : RANK + 16] = scales.view(np.uint8)
    tiles = case.latents[chosen, :RANK].reshape(-1, 4, 128) * factors[None, :, None]
    case.latents[chosen, :RANK] = tiles.reshape(-1, RANK)
    case.q_bits.view(np.uint16)[:] &= 0xBFFF
    case.q = widened(case.q_bits).astype(np.float64)
    case.scale = 1e-3
    case.check(*case.run(kernel_memory))


def test_result_in_bfloat16_and_without_logarithms(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.mla.tensor_core import attend_on_tensor_cores

    m, case = kernel_memory, make("fp8_ds_mla", [9, 0], 9, heads=5)
    wide, _ = case.run(m)
    out = m.poisoned((2, 5, RANK), "bfloat16")
    attend_on_tensor_cores(*case.inputs(m), out, softmax_scale=case.scale)
    found = widened(m.get(out))
    assert (np.abs(found - wide) <= 2.0**-8 * np.abs(wide)).all()


def test_empty_shapes(kernel_memory: KernelMemory) -> None:
    case = make("fp8_ds_mla", [0], 0, heads=2)
    case.check(*case.run(kernel_memory))
    none = replace(case, q_bits=case.q_bits[:0], slots=case.slots[:0], q=case.q[:0])
    assert none.run(kernel_memory)[0].shape == (0, 2, RANK)


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_real_sizes(kernel_memory: KernelMemory, cache_dtype: str, heads: int) -> None:
    if not kernel_memory.large:
        pytest.skip("2,048 keys are for a GPU")
    from fd_dsa.ops.mla.tensor_core import partial_rows

    counts = [2048, 0, 1, 1999, 64, 2048, 1025]
    case = make(cache_dtype, counts, 2048, heads=heads, num_slots=8192)
    case.check(*case.run(kernel_memory))
    case.check(*case.run(kernel_memory, partial_rows(heads)))


def test_records_past_two_to_the_31_bytes(kernel_memory: KernelMemory) -> None:
    if kernel_memory.name != "torch":
        pytest.skip("torch alone writes into two gigabytes in place")
    from fd_dsa.ops.mla.tensor_core import attend_on_tensor_cores

    m, case = kernel_memory, make("fp8_ds_mla", [40, 17], 40, heads=3)
    first = (2**31 + 2**24) // 656
    cache = m.poisoned((first + len(case.latents), 656), "uint8")
    cache[first:] = m.put(case.cache)
    out = m.poisoned((2, 3, RANK), "float32")
    slots = np.where(case.slots < 0, -1, case.slots + first).astype(np.int32)
    q = m.put(case.q_bits.view(np.uint16), "bfloat16")
    attend_on_tensor_cores(q, cache, m.put(slots), out, softmax_scale=case.scale)
    np.testing.assert_array_equal(m.get(out), case.run(m)[0])


@given(st.integers(1, 5000), st.integers(1, 130), st.integers(0, 4096), st.booleans())
def test_splits_fit_into_their_memory_and_cover_a_row(
    num_tokens: int, num_heads: int, topk: int, fp8: bool
) -> None:
    from fd_dsa.ops.mla.tensor_core import kernel_config, num_splits, partial_rows

    config, rows = kernel_config(num_heads, num_tokens, fp8), partial_rows(num_heads)
    splits = num_splits(num_tokens, num_heads, topk, config, rows)
    assert splits == 1 or num_tokens * num_heads * splits <= rows
    tiles = -(-topk // config.block_n)
    each = -(-tiles // splits)
    assert splits * each * config.block_n >= topk
    assert 1 <= splits <= max(1, tiles)
    assert num_splits(num_tokens, num_heads, topk, config, 0) == 1


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_few_tokens_fill_the_device(heads: int, fp8: bool) -> None:
    from fd_dsa.ops.mla.tensor_core import kernel_config, num_splits, partial_rows

    def cut(num_tokens: int) -> tuple[int, int]:
        """Programs, and splits of a row, of a step of so many tokens."""
        config = kernel_config(heads, num_tokens, fp8)
        splits = num_splits(num_tokens, heads, 2048, config, partial_rows(heads))
        return num_tokens * -(-heads // config.block_h) * splits, splits

    assert min(cut(n)[0] for n in (8, 16, 64)) >= 100
    assert cut(1)[1] >= 8
    assert cut(4096)[1] == 1
