"""fp8_ds_mla caches and queries, byte by byte, and what is read from them."""

from __future__ import annotations

import math
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.ops.arrays import Scratch
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.ops.fp8 import absolute_maximum, decode_e4m3, encode_e4m3, index_scale, raw_scale
from fd_dsa.ops.host_rows import gather_index_keys, gather_latents, hadamard
from fd_dsa.ops.logits.host_scores import PagedUnits, score_gathered, score_paged
from fd_dsa.ops.mla import attend_dense, attend_gathered
from fd_dsa.ops.query import prepare_on_host as prepare_indexer_query
from tests.ops.e4m3 import E4M3_VALUES
from tests.ops.fp8_goldens import NAMES, Golden
from tests.reference.float32 import ref_hadamard
from tests.reference.fp8 import ref_e4m3, ref_index_scale
from tests.reference.indexer import ref_score
from tests.reference.sparse_mla import ref_attend
from tests.reference.topk import ref_slot


def test_values_of_all_codes() -> None:
    found = decode_e4m3(np.arange(256, dtype=np.uint8))
    np.testing.assert_array_equal(found, E4M3_VALUES)
    np.testing.assert_array_equal(np.signbit(found[:255]), np.signbit(E4M3_VALUES[:255]))
    assert (found[0x7E], found[0x01], found[0x08]) == (448.0, 2.0**-9, 2.0**-6)


def test_every_number_has_its_own_code() -> None:
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    np.testing.assert_array_equal(encode_e4m3(decode_e4m3(codes)), codes)


def test_both_sides_of_every_boundary() -> None:
    """Half way between two numbers, and the float32 numbers next to it."""
    half = np.array([(low + high) / 2 for low, high in pairwise(E4M3_VALUES[:127])], np.float32)
    near = [np.nextafter(half, np.float32(end)) for end in (-np.inf, np.inf)]
    values = np.concatenate([half, *near])
    values = np.concatenate([values, -values])
    wanted = [ref_e4m3(float(x)) for x in values]
    np.testing.assert_array_equal(encode_e4m3(values), np.array(wanted, np.uint8))


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
@settings(max_examples=150)
def test_codes_of_any_float32(values: list[float]) -> None:
    found = encode_e4m3(np.array(values, np.float32))
    assert found.tolist() == [ref_e4m3(x) for x in values]


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        (0x00000000, 0x00),
        (0x80000000, 0x80),
        (0x00000001, 0x00),  # the smallest float32
        (0x7F800000, 0x7E),
        (0xFF800000, 0xFE),
        (0x7FC00000, 0x7F),
        (0xFFC00000, 0x7F),
        (0x7F800001, 0x7F),  # a signalling NaN
        (0xFFFFFFFF, 0x7F),
        (0x7F7FFFFF, 0x7E),
    ],
)
def test_codes_at_the_limits(bits: int, code: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    assert hex(encode_e4m3(value)[0]) == hex(code)


@given(st.floats(0, 2.0**127, width=32))
@settings(max_examples=150)
def test_index_scales(absmax: float) -> None:
    row = [absmax, 0.0]
    for scale_fmt in ("ue8m0", None):
        found = index_scale(np.array([absmax], np.float32), scale_fmt)[0]
        assert found == ref_index_scale(row, scale_fmt)
    # the smallest power of two that holds the tile
    power = float(index_scale(np.array([absmax], np.float32), "ue8m0")[0])
    assert math.frexp(power)[0] == 0.5
    assert power / 2 < float(found) <= power


def test_scales_of_tiles_without_numbers() -> None:
    tiles = np.array([[0.0, -0.0], [np.nan, np.nan], [np.nan, -3.0]], np.float32)
    absmax = absolute_maximum(tiles)
    assert absmax.tolist() == [0.0, 0.0, 3.0]
    assert raw_scale(absmax).tolist() == [2.0**-126, 2.0**-126, np.float32(3 / 448)]


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_of_both_caches(name: str) -> None:
    golden = Golden.load(name)
    arguments = golden.write_arguments()
    write_caches(**arguments)
    for cache in ("latent_cache", "index_cache"):
        np.testing.assert_array_equal(arguments[cache], golden.arrays[cache], err_msg=cache)


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_of_the_queries(name: str) -> None:
    golden = Golden.load(name)
    wanted = golden.arrays["q_codes"], golden.arrays["q_weights"]
    arrays, how = golden.query_arguments()
    out = np.empty(wanted[0].shape, np.uint8), np.empty(wanted[1].shape, np.float32)
    assert prepare_indexer_query(*(x.copy() for x in arrays), **how, out=out) is out
    for found, array in zip(out, wanted, strict=True):
        np.testing.assert_array_equal(found, array)
    # without buffers for codes it returns their values, which a GEMM on a CPU needs
    values, weights = prepare_indexer_query(*arrays, **how)
    np.testing.assert_array_equal(values, decode_e4m3(wanted[0]))
    np.testing.assert_array_equal(weights, wanted[1])


def test_a_token_of_nan_spoils_itself_only() -> None:
    rng = np.random.default_rng(0)
    kv_a = rng.standard_normal((3, 576)).astype(np.float32)
    index_k = rng.standard_normal((3, 128)).astype(np.float32)
    kv_a[1, 3], kv_a[1, 570], index_k[1, 9] = np.nan, np.nan, np.nan
    params = CacheWriteParams(
        "fp8_ds_mla",
        kv_norm_weight=np.ones(512, np.float32),
        k_norm_weight=np.ones(128, np.float32),
        k_norm_bias=np.zeros(128, np.float32),
    )
    latent, index = np.zeros((1, 1, 64, 656), np.uint8), np.zeros((1, 64, 132), np.uint8)
    table = np.concatenate([np.ones((3, 32)), np.zeros((3, 32))], 1).astype(np.float32)
    write_caches(kv_a, index_k, np.arange(3), np.arange(3), table, latent, index, params)
    found = np.empty((3, 576), np.float32)
    gather_latents(latent.reshape(-1, 656), np.arange(3), found, Scratch())
    # one NaN spoils the norm of its token, and the pair that rotates with it
    assert np.isnan(found[1, :512]).all()
    assert np.isnan(found[1, 570])
    keys = np.empty((3, 128), np.float32)
    scales = gather_index_keys(index, np.arange(3), keys, Scratch())
    assert np.isnan(keys[1]).all()
    for array in (found, keys, scales):
        assert np.isfinite(array[[0, 2]]).all()


def test_hadamard_is_sylvester_s() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((2, 3, 128)).astype(np.float32)
    wanted = np.array([[ref_hadamard(row) for row in head] for head in rows.tolist()], np.float32)
    np.testing.assert_array_equal(hadamard(rows), wanted)
    # orthogonal, and its own inverse
    np.testing.assert_allclose(hadamard(hadamard(rows)), rows, rtol=0, atol=1e-5)
    # entry [i, j] is -1 to the number of bits that i and j share
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    np.testing.assert_allclose(hadamard(np.eye(128, dtype=np.float32)), signs / 128**0.5, atol=1e-6)


class Filled:
    """Caches of both kinds with finite keys in `used` slots and NaN everywhere else."""

    def __init__(self, used: np.ndarray, num_blocks: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.latent = np.full((num_blocks, 1, 64, 656), 0xFF, np.uint8)
        self.index = np.full((num_blocks, 64, 132), 0xFF, np.uint8)
        kv_a = rng.standard_normal((len(used), 576)).astype(np.float32)
        index_k = rng.standard_normal((len(used), 128)).astype(np.float32)
        slots = used.astype(np.int64)
        params = CacheWriteParams("fp8_ds_mla")
        write_caches(kv_a, index_k, None, slots, None, self.latent, self.index, params)
        self.rows = self.latent.reshape(-1, 656)
        self.kv_a, self.index_k = kv_a, index_k

    def row(self, slot: int) -> np.ndarray:
        """float64 [576]: what the record of a slot says."""
        record = self.rows[slot]
        scales = record[512:528].copy().view(np.float32).astype(np.float64)
        values = E4M3_VALUES[record[:512]].astype(np.float64) * np.repeat(scales, 128)
        rope = (record[528:].copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return np.concatenate([values, rope.astype(np.float64)])

    def key(self, slot: int) -> tuple[np.ndarray, float]:
        """float64 [128] codes' values and the scale of an index key."""
        block, offset = divmod(slot, 64)
        planes = self.index[block].reshape(-1)
        codes = planes[offset * 128 : offset * 128 + 128]
        scale = planes[8192 + 4 * offset : 8196 + 4 * offset].copy().view(np.float32)[0]
        return np.array([float(E4M3_VALUES[c]) for c in codes]), float(scale)


def test_latents_are_code_times_scale_in_float32() -> None:
    used = np.array([0, 63, 64, 100, 127])
    filled = Filled(used, 2)
    found = np.empty((5, 576), np.float32)
    gather_latents(filled.rows, used, found, Scratch())
    wanted = np.array([filled.row(slot) for slot in used])
    np.testing.assert_array_equal(found, wanted.astype(np.float32))
    # e4m3 has 4 significant bits: half a step is at most 2^-4 of a value
    error = np.abs(found[:, :512] - filled.kv_a[:, :512])
    limit = np.abs(filled.kv_a[:, :512]) * 2.0**-4 + 2.0**-9 / 448 * 5
    assert (error <= limit).all()
    assert error.max() > 2.0**-6


@pytest.mark.parametrize("how", ["gathered", "masked"])
def test_attention_on_fp8_latents(how: str) -> None:
    import paddle

    rng = np.random.default_rng(3)
    used = rng.permutation(192)[:40].astype(np.int64)
    filled = Filled(used, 3)
    q = rng.standard_normal((6, 4, 576)).astype(np.float32)
    chosen = [np.sort(rng.permutation(40)[: 3 + 4 * t]) for t in range(6)]
    options = {"softmax_scale": 0.05, "kv_lora_rank": 512}
    if how == "masked":
        mask = np.full((6, 40), -np.inf, np.float32)
        for t, columns in enumerate(chosen):
            mask[t, columns] = 0
        found = attend_dense(paddle.to_tensor(q), filled.rows, used, mask, **options)
    else:
        indices = np.full((6, 30), -1, np.int32)
        for t, columns in enumerate(chosen):
            indices[t, : len(columns)] = used[columns]
        found = attend_gathered(paddle.to_tensor(q), filled.rows, indices, **options)
    rows = np.array([filled.row(slot) for slot in used])
    wanted = np.array([ref_attend(q[t], rows, c, 0.05, 512) for t, c in enumerate(chosen)])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def fp8_query(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of quantised queries [*shape, 128] and their weights [*shape]."""
    values = rng.integers(0, 256, (*shape, 128)).astype(np.uint8)
    values[values & 0x7F == 0x7F] = 0
    return decode_e4m3(values), rng.standard_normal(shape).astype(np.float32)


def check_scores(
    filled: Filled, q: np.ndarray, weights: np.ndarray, slots: list[int], found: np.ndarray
) -> None:
    """k_scale * sum_h w[h] * relu(q8[h] . k8), within the rounding of float32 sums."""
    wanted = []
    for slot in slots:
        key, scale = filled.key(slot)
        wanted.append(scale * ref_score(q, weights, key))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_scores_of_gathered_fp8_keys() -> None:
    rng = np.random.default_rng(4)
    used = rng.permutation(192)[:20].astype(np.int64)
    filled = Filled(used, 3)
    q, weights = fp8_query(rng, 5, 3)
    found = score_gathered(q, weights, filled.index, used)
    for t in range(5):
        check_scores(filled, q[t], weights[t], used.tolist(), found[t])


def test_scores_of_paged_fp8_keys() -> None:
    rng = np.random.default_rng(5)
    lengths, table = np.array([130, 5]), np.array([[4, 1, 2], [3, -1, -1]], np.int32)
    slots = [[ref_slot(p, table[row], 64) for p in range(n)] for row, n in enumerate(lengths)]
    filled = Filled(np.array(list(chain(*slots))), 6)
    q, weights = fp8_query(rng, 2, 2, 3)
    units = PagedUnits.build(lengths, table, 64)
    found = score_paged(q, weights, filled.index, units)
    for row, n in enumerate(lengths):
        for j in range(2):
            check_scores(filled, q[row, j], weights[row, j], slots[row], found[row, j, :n])
