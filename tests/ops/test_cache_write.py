"""Cache rows: where they are written, how they are rounded, and how they are read back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.ops.arrays import Scratch
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.ops.host_rows import gather_rows
from tests.reference.bfloat16 import ref_array, ref_bits
from tests.reference.indexer import ref_layer_norm, ref_rms_norm
from tests.reference.rope import ref_rotate

UNTOUCHED = 77
STORAGE = {"float32": np.float32, "bfloat16": np.int16}


def written(values: np.ndarray, slots: list[int], num_slots: int, dtype: str) -> np.ndarray:
    """A latent cache of `UNTOUCHED`, one slot a block, after one write of finished rows."""
    cache = np.full((num_slots, 1, 1, values.shape[1]), UNTOUCHED, STORAGE[dtype])
    slot_mapping = np.array(slots, np.int64)
    write_caches(values, None, None, slot_mapping, None, cache, None, CacheWriteParams(dtype))
    return cache.reshape(num_slots, -1)


@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
@settings(max_examples=150)
def test_bfloat16_bits_of_any_value(values: list[float]) -> None:
    nans = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000])
    row = np.concatenate([np.float32(values), nans.view(np.float32)])[None]
    found = written(row, [0], 1, "bfloat16").view(np.uint16)[0]
    for value, bits in zip(row[0], found, strict=True):
        if np.isnan(value):
            # any quiet NaN
            assert bits & 0x7FC0 == 0x7FC0, hex(bits)
        else:
            assert bits == ref_bits(float(value)), float(value).hex()


@pytest.mark.parametrize(
    ("bits", "wanted"),
    [
        (0x3F808000, 0x3F80),  # half way, even below
        (0x3F818000, 0x3F82),  # half way, even above
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0xBF818000, 0xBF82),
        (0x80000000, 0x8000),  # -0.0
        (0x00000001, 0x0000),  # the smallest subnormal
        (0x00018000, 0x0002),  # a subnormal half way
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 rounds to infinity
        (0x7F7F7FFF, 0x7F7F),
    ],
)
def test_bfloat16_ties_and_limits(bits: int, wanted: int) -> None:
    row = np.array([[bits]], np.uint32).view(np.float32)
    assert hex(written(row, [0], 1, "bfloat16").view(np.uint16)[0, 0]) == hex(wanted)


@pytest.mark.parametrize("dtype", STORAGE)
def test_slots_outside_the_cache_are_skipped(dtype: str) -> None:
    for none in ([], [-1, -1]):
        cache = written(np.ones((len(none), 2), np.float32), none, 3, dtype)
        assert (cache == UNTOUCHED).all()
    values = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    cache = written(values, [5, -1, 0, 6, -7], 6, dtype)
    assert (cache[[1, 2, 3, 4]] == UNTOUCHED).all()
    found = np.empty((2, 2), np.float32)
    gather_rows(cache, np.array([5, 0]), found, Scratch())
    assert found.tolist() == [[1, 2], [5, 6]]


def test_float32_is_written_bit_by_bit() -> None:
    bits = np.array([[0x7FC00001, 0x80000000, 0x00000001, 0x7F7FFFFF]], np.uint32)
    found = written(bits.view(np.float32), [1], 2, "float32")
    assert found.view(np.uint32)[1].tolist() == bits[0].tolist()


RANK, ROPE, DIM, BLOCK = 6, 4, 8, 4


def inputs(num_tokens: int = 5, seed: int = 0) -> dict[str, Any]:
    """Arguments of a write of both caches, all norms and rotations in it."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-3, 3, (9, ROPE // 2))
    return {
        "kv_a": rng.standard_normal((num_tokens, RANK + ROPE)).astype(np.float32),
        "index_k": 3 + rng.standard_normal((num_tokens, DIM)).astype(np.float32),
        "position_ids": rng.permutation(9)[:num_tokens],
        "slot_mapping": rng.permutation(3 * BLOCK)[:num_tokens],
        "cos_sin_cache": np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        "latent_cache": np.full((3, 1, BLOCK, RANK + ROPE), UNTOUCHED, np.float32),
        "index_cache": np.full((3, BLOCK, DIM), UNTOUCHED, np.float32),
        "params": CacheWriteParams(
            "float32",
            kv_norm_weight=rng.standard_normal(RANK).astype(np.float32),
            kv_norm_eps=1e-2,
            k_norm_weight=rng.standard_normal(DIM).astype(np.float32),
            k_norm_bias=rng.standard_normal(DIM).astype(np.float32),
            k_norm_eps=1e-3,
            index_rope_interleave=False,
        ),
    }


def ref_latent(given: dict[str, Any], token: int) -> np.ndarray:
    """Return the expected record of a token in the latent cache."""
    row, p = given["kv_a"][token].astype(np.float64), given["params"]
    cos, sin = np.split(given["cos_sin_cache"][given["position_ids"][token]].astype(float), 2)
    latent = ref_rms_norm(row[:RANK], p.kv_norm_weight, p.kv_norm_eps)
    return np.concatenate([latent, ref_rotate(row[RANK:], np.arctan2(sin, cos), True)])


def ref_key(given: dict[str, Any], token: int) -> np.ndarray:
    """Return the expected key of a token in the indexer cache."""
    p = given["params"]
    key = ref_layer_norm(
        given["index_k"][token].astype(np.float64), p.k_norm_weight, p.k_norm_bias, p.k_norm_eps
    )
    cos, sin = np.split(given["cos_sin_cache"][given["position_ids"][token]].astype(float), 2)
    key[:ROPE] = ref_rotate(key[:ROPE], np.arctan2(sin, cos), p.index_rope_interleave)
    return key


@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_and_rotations(interleaved: bool) -> None:
    given = inputs()
    given["params"] = replace(given["params"], index_rope_interleave=interleaved)
    before = {name: given[name].copy() for name in ("kv_a", "index_k")}
    write_caches(**given)
    latents = given["latent_cache"].reshape(-1, RANK + ROPE)
    keys = given["index_cache"].reshape(-1, DIM)
    for token, slot in enumerate(given["slot_mapping"]):
        np.testing.assert_allclose(latents[slot], ref_latent(given, token), rtol=0, atol=2e-6)
        np.testing.assert_allclose(keys[slot], ref_key(given, token), rtol=0, atol=2e-6)
    unused = np.setdiff1d(np.arange(3 * BLOCK), given["slot_mapping"])
    assert (latents[unused] == UNTOUCHED).all()
    assert (keys[unused] == UNTOUCHED).all()
    for name, kept in before.items():
        np.testing.assert_array_equal(given[name], kept)


def test_each_cache_may_be_written_alone() -> None:
    both, alone = inputs(), inputs()
    write_caches(**both)
    write_caches(**(alone | {"index_k": None, "index_cache": None}))
    assert (alone["index_cache"] == UNTOUCHED).all()
    write_caches(**(alone | {"kv_a": None, "latent_cache": None}))
    for name in ("latent_cache", "index_cache"):
        np.testing.assert_array_equal(alone[name], both[name])


def test_columns_of_a_wider_projection_and_blocks_that_lie_apart() -> None:
    given, apart = inputs(), inputs()
    write_caches(**given)
    wide = np.full((5, 3 + RANK + ROPE), 1e9, np.float32)
    wide[:, 3:] = apart["kv_a"]
    padded = np.full((3, 1, BLOCK + 2, RANK + ROPE), UNTOUCHED, np.float32)
    apart |= {"kv_a": wide[:, 3:], "latent_cache": padded[:, :, :BLOCK]}
    write_caches(**apart)
    np.testing.assert_array_equal(apart["latent_cache"], given["latent_cache"])
    assert (padded[:, :, BLOCK:] == UNTOUCHED).all()


def test_paddle_memory() -> None:
    given, tensors = inputs(), inputs()
    write_caches(**given)
    names = [name for name in tensors if name != "params"]
    tensors |= {name: paddle.to_tensor(tensors[name]) for name in names}
    write_caches(**tensors)
    for name in ("latent_cache", "index_cache"):
        np.testing.assert_array_equal(tensors[name].numpy(), given[name])


def test_bfloat16_is_rounded_once_when_it_is_stored() -> None:
    given, rounded = inputs(), inputs()
    write_caches(**given)
    rounded["params"] = replace(given["params"], kv_cache_dtype="bfloat16")
    for name in ("latent_cache", "index_cache"):
        rounded[name] = np.zeros(rounded[name].shape, np.int16)
    write_caches(**rounded)
    slots = given["slot_mapping"]
    for name, width in (("latent_cache", RANK + ROPE), ("index_cache", DIM)):
        bits = rounded[name].view(np.uint16).astype(np.uint32) << 16
        found = bits.view(np.float32).reshape(-1, width)[slots]
        np.testing.assert_array_equal(found, ref_array(given[name].reshape(-1, width)[slots]))


@pytest.mark.parametrize("dtype", STORAGE)
def test_gather_repeats_and_reorders(dtype: str) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((24, 3)).astype(np.float32)
    cache = written(values, list(range(24)), 24, dtype).reshape(6, 4, 3)
    index = np.array([5, 0, 5, 2])
    found = np.full((4, 4, 3), np.nan, np.float32)
    gather_rows(cache, index, found, Scratch())
    values = values.reshape(6, 4, 3)
    wanted = values[index] if dtype == "float32" else ref_array(values[index])
    np.testing.assert_array_equal(found, wanted)


def test_gather_keeps_nan_and_infinities_of_bfloat16() -> None:
    cache = np.array([[0x7FC0], [0x7F80], [0xFF80], [0x8000]], np.uint16).view(np.int16)
    found = np.empty((4, 1), np.float32)
    gather_rows(cache, np.arange(4), found, Scratch())
    assert np.isnan(found[0, 0])
    assert found[1:3, 0].tolist() == [np.inf, -np.inf]
    assert found.view(np.uint32)[3, 0] == 0x80000000
