"""The cache-write kernel: the CPU's bytes, the oracle's values, and nothing else touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import LaunchError, ShapeError
from tests.kernel_memory import POISON, KernelMemory
from tests.ops.cache_write_case import (
    BITS,
    BLOCK,
    DIM,
    FORMATS,
    RANK,
    Case,
    arguments,
    assert_same_bytes,
    extreme_rows,
    in_kernel,
    make_case,
    on_cpu,
)
from tests.reference.bfloat16 import ref_array
from tests.reference.fp8 import ref_hadamard, ref_index_key, ref_record
from tests.reference.indexer import ref_layer_norm, ref_rms_norm
from tests.reference.rope import ref_rotate


def sizes(m: KernelMemory) -> tuple[int, ...]:
    """Numbers of tokens: off every tile, and on a GPU those of serving and both sides of 4096."""
    return (1, 63, 700, 4097) if m.large else (1, 5)


# the choices of a layer's indexer in records, and with each type of a cache
KINDS = [
    *(("fp8_ds_mla", params) for params in FORMATS.values()),
    *(
        (dtype, FORMATS[name])
        for dtype in ("float32", "bfloat16")
        for name in ("half-split", "hadamard")
    ),
]


@pytest.mark.parametrize(("dtype", "params"), KINDS, ids=str)
def test_bytes_are_those_of_the_cpu(
    kernel_memory: KernelMemory, dtype: str, params: dict[str, Any]
) -> None:
    for num_tokens in sizes(kernel_memory):
        case = make_case(num_tokens, dtype, seed=num_tokens, **params)
        wanted = on_cpu(case)
        assert_same_bytes(in_kernel(kernel_memory, case), wanted)
        # cos and sin gathered before
        assert_same_bytes(on_cpu(case.gathered()), wanted)
        assert_same_bytes(in_kernel(kernel_memory, case.gathered()), wanted)


def parts_of(case: Case) -> dict[str, Case]:
    """Writes that leave something out."""
    return {
        "no indexer": case.changed(index_k=None),
        "index key alone": case.changed(kv_a=None),
        "normed before": case.changed(kv_norm_weight=None, k_norm_weight=None, k_norm_bias=None),
        "k_norm on another stream": case.changed(k_norm_weight=None, k_norm_bias=None),
        "rotated before": case.changed(cos_sin_cache=None),
        "as they are": case.changed(
            cos_sin_cache=None, kv_norm_weight=None, k_norm_weight=None, k_norm_bias=None
        ),
    }


@pytest.mark.parametrize("part", parts_of(make_case(1)))
@pytest.mark.parametrize("dtype", ["fp8_ds_mla", "bfloat16"])
def test_parts_are_left_out(kernel_memory: KernelMemory, dtype: str, part: str) -> None:
    case = parts_of(make_case(sizes(kernel_memory)[1], dtype))[part]
    assert_same_bytes(in_kernel(kernel_memory, case), on_cpu(case))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", BITS)
def test_bfloat16_activations(kernel_memory: KernelMemory, dtype: str, interleaved: bool) -> None:
    case = make_case(sizes(kernel_memory)[1], dtype, index_rope_interleave=interleaved)
    case = case.changed(kv_a=ref_array(case.kv_a), index_k=ref_array(case.index_k))
    assert_same_bytes(in_kernel(kernel_memory, case, "bfloat16"), on_cpu(case))


@pytest.mark.parametrize(("rank", "rope"), [(100, 16), (16, 4), (300, 32)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_other_widths(kernel_memory: KernelMemory, rank: int, rope: int, interleaved: bool) -> None:
    from fd_dsa.ops.cache_write import CacheWriteParams, triton_kernel, write_on_host

    m, rng = kernel_memory, np.random.default_rng(rank)
    rows, keys, weight, k_weight, k_bias, angles = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((3, rank + rope), (3, 2 * rope), rank, 2 * rope, 2 * rope, (9, rope))
    )
    given = (rows, keys, np.array([8, 0, 3]), np.array([5, 0, 2]), angles)
    wanted = np.zeros((2, 1, 4, rank + rope), np.float32), np.zeros((2, 4, 2 * rope), np.float32)
    norms = (weight, 1e-6, k_weight, k_bias, 1e-5, interleaved)
    write_on_host(*given, *wanted, CacheWriteParams("float32", *norms))
    caches = [m.put(np.zeros_like(cache)) for cache in wanted]
    norms = tuple(m.put(x) if isinstance(x, np.ndarray) else x for x in norms)
    params = CacheWriteParams("float32", *norms)
    triton_kernel.write_caches(*(m.put(x) for x in given), *caches, params)
    assert_same_bytes([m.get(cache) for cache in caches], wanted)


@pytest.mark.parametrize(("dtype", "params"), KINDS, ids=str)
def test_programs_of_several_tokens(
    kernel_memory: KernelMemory,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    params: dict[str, Any],
) -> None:
    from fd_dsa.ops.cache_write import triton_kernel

    # they load the weights late, and the last program has tokens that are none
    monkeypatch.setattr(triton_kernel, "configuration", lambda num_tokens: (4, 1, None))
    case = make_case(7, dtype, **params)
    slots = case.slot_mapping.copy()
    slots[2] = -1
    case = case.changed(slot_mapping=slots)
    assert_same_bytes(in_kernel(kernel_memory, case), on_cpu(case))


def test_every_nan_stays_one_in_bfloat16(kernel_memory: KernelMemory) -> None:
    nans = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7FBFFFFF]
    case = make_case(2, "bfloat16").changed(
        cos_sin_cache=None, kv_norm_weight=None, k_norm_weight=None, k_norm_bias=None
    )
    for rows in (case.kv_a, case.index_k):
        rows.view(np.uint32)[0] = np.resize(np.uint32(nans), rows.shape[1])
    for cache in in_kernel(kernel_memory, case):
        bits = cache.view(np.uint16).reshape(-1, cache.shape[-1])[case.slot_mapping[0]]
        assert ((bits & 0x7F80) == 0x7F80).all()
        assert (bits & 0x007F).all()


@pytest.mark.parametrize("dtype", ["fp8_ds_mla", "float32"])
def test_positions_past_the_table_read_its_ends(kernel_memory: KernelMemory, dtype: str) -> None:
    case = make_case(4, dtype)
    last = len(case.cos_sin_cache) - 1
    wild = case.changed(position_ids=np.array([-1, -(2**50), last + 1, 2**50]))
    ends = case.changed(position_ids=np.array([0, 0, last, last]))
    assert_same_bytes(in_kernel(kernel_memory, wild), on_cpu(ends))


def test_values_are_those_of_float64(kernel_memory: KernelMemory) -> None:
    case = make_case(3, "float32", index_hadamard=True, index_rope_interleave=False)
    latents, keys = in_kernel(kernel_memory, case)
    latents, keys, p = latents.reshape(-1, RANK + 64), keys.reshape(-1, DIM), case.params
    for t, slot in enumerate(case.slot_mapping):
        cos, sin = np.split(case.cos_sin_cache[case.position_ids[t]].astype(float), 2)
        angles, row = np.arctan2(sin, cos), case.kv_a[t].astype(float)
        wanted = ref_rms_norm(row[:RANK], p.kv_norm_weight, p.kv_norm_eps)
        np.testing.assert_allclose(latents[slot, :RANK], wanted, rtol=0, atol=5e-6)
        wanted = ref_rotate(row[RANK:], angles, True)
        np.testing.assert_allclose(latents[slot, RANK:], wanted, rtol=0, atol=5e-6)
        key = ref_layer_norm(
            case.index_k[t].astype(float), p.k_norm_weight, p.k_norm_bias, p.k_norm_eps
        )
        key[:64] = ref_rotate(key[:64], angles, False)
        np.testing.assert_allclose(keys[slot], ref_hadamard(key), rtol=0, atol=5e-6)


@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
@pytest.mark.parametrize("interleaved", [False, True])
def test_extreme_numbers(
    kernel_memory: KernelMemory, scale_fmt: str | None, interleaved: bool
) -> None:
    latents, keys = extreme_rows(RANK), extreme_rows(DIM)
    k_pe = np.resize(keys, (len(latents), 64))
    # any NaN will do in bfloat16
    k_pe[np.isnan(k_pe)] = 1.0
    case = make_case(
        len(latents), index_scale_fmt=scale_fmt, index_rope_interleave=interleaved
    ).changed(
        kv_a=np.concatenate([latents, k_pe], 1),
        index_k=keys,
        cos_sin_cache=None,
        kv_norm_weight=None,
        k_norm_weight=None,
        k_norm_bias=None,
    )
    found = in_kernel(kernel_memory, case)
    assert_same_bytes(found, on_cpu(case))
    records = found[0].reshape(-1, 656)
    for t, slot in enumerate(case.slot_mapping):
        np.testing.assert_array_equal(records[slot], ref_record(latents[t], k_pe[t]), str(t))
        codes, scale = ref_index_key(keys[t], scale_fmt)
        block, offset = divmod(int(slot), BLOCK)
        plane = found[1][block].reshape(-1)
        np.testing.assert_array_equal(plane[offset * 128 : offset * 128 + 128], codes, str(t))
        assert plane[8192:].view(np.float32)[offset] == scale, t


def test_broken_activations_through_the_norms(kernel_memory: KernelMemory) -> None:
    case = make_case(6)
    for row, value in enumerate((np.nan, np.inf, 3e38, 1e-40, 0.0)):
        case.kv_a[row, 3::7] = value
        case.index_k[row, 3::7] = value
    case.kv_a[4], case.index_k[4] = 0.0, 0.0
    # NaN of k_pe has no fixed bits
    case.kv_a[:, RANK:] = 1.0
    found, wanted = in_kernel(kernel_memory, case), on_cpu(case)
    assert_same_bytes(found, wanted)
    assert (found[0].reshape(-1, 656)[case.slot_mapping[0], :RANK] == 0x7F).all()


@pytest.mark.parametrize("dtype", BITS)
def test_only_live_slots_are_written(kernel_memory: KernelMemory, dtype: str) -> None:
    case = make_case(sizes(kernel_memory)[1], dtype)
    num_slots = case.num_blocks * BLOCK
    slots = case.slot_mapping.copy()
    slots[::3] = [(-1, num_slots, -(2**40), 2**40)[i % 4] for i in range(len(slots[::3]))]
    # padding may carry any position
    positions = np.where((slots < 0) | (slots >= num_slots), 2**50, case.position_ids)
    found = in_kernel(kernel_memory, case.changed(slot_mapping=slots, position_ids=positions))
    live = (slots >= 0) & (slots < num_slots)
    wanted = on_cpu(case.changed(
        slot_mapping=slots[live], position_ids=case.position_ids[live],
        kv_a=case.kv_a[live], index_k=case.index_k[live],
    ))  # fmt: skip
    assert_same_bytes(found, wanted)
    untouched = np.setdiff1d(np.arange(num_slots), slots)
    assert (found[0].view(np.uint8).reshape(num_slots, -1)[untouched] == POISON).all()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_to_write(kernel_memory: KernelMemory, num_tokens: int) -> None:
    case = make_case(num_tokens)
    case = case.changed(slot_mapping=np.full(num_tokens, -1))
    assert_same_bytes(in_kernel(kernel_memory, case), case.poisoned_caches())


def test_columns_of_a_wider_projection(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.cache_write.triton_kernel import write_caches

    m, case = kernel_memory, make_case(5)
    wide = np.full((5, 64 + 576 + 128), 1e9, np.float32)
    wide[:, 64:640], wide[:, 640:] = case.kv_a, case.index_k
    tensor, given = m.put(wide), arguments(m, case)
    write_caches(tensor[:, 64:640], tensor[:, 640:], *given[2:])
    assert_same_bytes((m.get(given[5]), m.get(given[6])), on_cpu(case))


def test_refusals(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.cache_write.triton_kernel import write_caches

    m, case = kernel_memory, make_case(2)
    given = arguments(m, case)
    odd = m.put(np.zeros((2, 577), np.float32))[:, 1:]
    with pytest.raises(ShapeError, match="kv_a are 577 values apart"):
        write_caches(odd, *given[1:])
    narrow = m.put(np.zeros((9, 32), np.float32))
    with pytest.raises(ShapeError, match=r"index_head_dim = 2 . rope_dim, got 128 and 32"):
        write_caches(*given[:4], narrow, *given[5:])
    short = replace(given[7], kv_norm_weight=m.put(np.zeros(448, np.float32)))
    with pytest.raises(ShapeError, match=r"kv_norm_weight has shape \[448\], allowed is \[512\]"):
        write_caches(*given[:4], None, *given[5:7], short)
    small = m.put(np.zeros((1, BLOCK, 132), np.uint8))
    with pytest.raises(ShapeError, match="caches have"):
        write_caches(*given[:6], small, given[7])
    apart = m.put(np.zeros((case.num_blocks, 1, BLOCK, 700), np.uint8))[..., :656]
    with pytest.raises(LaunchError, match="latent_ptr"):
        write_caches(*given[:5], apart, *given[6:])
    assert (m.get(given[6]) == POISON).all()
