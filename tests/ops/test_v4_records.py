"""FP8 records of DeepSeek-V4's keys and entries on a device, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.cache_formats import v4_record_bytes
from fd_dsa.ops.v4_attend import attend_v4, new_partials
from fd_dsa.ops.v4_entries import Compression, Plan, Pooling
from fd_dsa.ops.v4_places import Entries
from fd_dsa.ops.v4_rotation import rotate_heads
from fd_dsa.ops.v4_write_kernels import Ring, keep_step, write_step
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8, v4_records
from tests.ops.test_v4_kernels import (
    COS_SIN,
    EPS,
    ROPE,
    STEPS,
    Attended,
    AttendedInTiles,
    check,
    drawn,
)
from tests.ops.v4_records import codes, exponents

pytestmark = pytest.mark.triton

WIDTH, INDEX_WIDTH, RANK = 32, 16, 3


def norms(m: KernelMemory) -> tuple[Any, Any, float]:
    """Norms of latents and keys without weights."""
    latents, keys = (m.put(np.ones(width, np.float32)) for width in (RANK, WIDTH))
    return latents, keys, EPS


def test_records_of_keys(paddle_memory: KernelMemory) -> None:
    """Groups of zeros, of one size, and of sizes that scales of float32 do not reach."""
    m, positions = paddle_memory, np.array([0, 5, 63, 7, 1], np.int32)
    rows = np.random.default_rng(2).standard_normal((5, WIDTH)).astype(np.float32)
    rows[0, :ROPE] = 0
    rows[1] *= np.logspace(-9, 9, WIDTH, dtype=np.float32)
    rows[2, ROPE : 2 * ROPE] = 448 * 2.0**-5
    projected = m.put(np.concatenate((np.ones((5, RANK), np.float32), rows), axis=1))
    given = projected, *norms(m), m.put(COS_SIN), m.put(positions)
    plain = m.get(write_step(*given)[1])
    found = m.get(write_step(*given, as_records=True)[1])
    assert found.shape == (5, v4_record_bytes(WIDTH, ROPE))
    np.testing.assert_array_equal(found, v4_records.records(plain))
    assert np.abs(v4_records.values(found) - plain).max() <= np.abs(plain).max() / 16
    # the ring gets the bytes, in this launch or another one
    places = m.put(np.array([6, -1, 2, 0, -1], np.int32))
    for keeps in (True, False):
        ring = Ring(places, m.put(np.zeros((7, found.shape[1]), np.uint8)))
        if keeps:
            write_step(*given, None, ring, as_records=True)
        else:
            keep_step(m.put(found), ring)
        np.testing.assert_array_equal(m.get(ring.keys)[[6, 2, 0]], found[[0, 2, 3]])
        assert not m.get(ring.keys)[[1, 3, 4, 5]].any()


def test_records_of_entries(paddle_memory: KernelMemory) -> None:
    """Records of a layer, and of the indexer, whose scales follow the codes of a block."""
    m, ratio, per_block, rng = paddle_memory, 4, 3, np.random.default_rng(3)
    source = 4 * (WIDTH + INDEX_WIDTH)
    sources = m.put(rng.standard_normal((8, source)).astype(np.float32))
    states = m.put(np.full((2 * ratio, source), np.nan, np.float32))
    plan = np.array([(3, 0, 3, 0), (7, 0, 7, 0), (-1, -1, -1, -1)], np.int32)
    rows = np.array([4, 1, -1], np.int32)
    work = Plan(m.put(plan), m.put(rows), m.put(plan), 3, 0, ratio, 2 * ratio, 2 * ratio)
    weights = [
        (m.put(rng.random(2 * ratio * width, np.float32)), m.put(rng.random(width, np.float32)))
        for width in (WIDTH, INDEX_WIDTH)
    ]

    def pooled(kind: str, *bytes_of_rows: int) -> list[np.ndarray]:
        pools = [m.poisoned((2, per_block, size), kind) for size in bytes_of_rows]
        made = [Pooling(*one, pool) for one, pool in zip(weights, pools, strict=True)]
        step = Compression(sources, states, work, *made)
        projected = m.put(np.ones((8, RANK + WIDTH), np.float32))
        positions, is_fp8 = m.put(np.arange(8, dtype=np.int32)), kind == "uint8"
        given = m.put(COS_SIN), positions, step
        write_step(projected, *norms(m), *given, as_records=is_fp8)
        return [m.get(pool) for pool in pools]

    plain, plain_index = pooled("float32", WIDTH, INDEX_WIDTH)
    found, index = pooled("uint8", v4_record_bytes(WIDTH, ROPE), INDEX_WIDTH + 4)
    wanted = plain.reshape(6, -1)[rows[:2]]
    np.testing.assert_array_equal(found.reshape(6, -1)[rows[:2]], v4_records.records(wanted))
    for row in rows[:2]:
        key, (block, entry) = plain_index.reshape(6, -1)[row], divmod(int(row), per_block)
        power = exponents(np.abs(key).max())
        cells = index[block].reshape(-1)
        coded = cells[: per_block * INDEX_WIDTH].reshape(per_block, -1)[entry]
        np.testing.assert_array_equal(coded, codes(key / 2.0 ** (power - 127)))
        scales = cells[per_block * INDEX_WIDTH :].copy().view(np.float32)
        assert scales[entry] == 2.0 ** (power - 127)


@pytest.mark.parametrize("kind", STEPS)
def test_fp8_queries_of_the_indexer(kind: str, paddle_memory: KernelMemory) -> None:
    """Codes, and weights of heads with the scales."""
    m, positions = paddle_memory, paddle_memory.put(np.array([0, 5, 63], np.int32))
    (heads, exact), rng = drawn(m, kind, 3, 17 * INDEX_WIDTH), np.random.default_rng(4)
    weights = rng.random((3, 17), np.float32)
    given = m.put(weights), m.put(COS_SIN), positions
    wanted = m.get(rotate_heads(block_fp8.put(m, exact, "float32"), *given)[0])
    found, scaled = map(m.get, rotate_heads(heads, *given, as_codes=True))
    powers = exponents(np.abs(wanted).max(axis=2))
    np.testing.assert_array_equal(found, codes(wanted / 2.0 ** (powers[..., None] - 127)))
    np.testing.assert_array_equal(scaled, weights * np.float32(2.0) ** (powers - 127))


class InRecords(Attended):
    """The same keys as records."""

    def rounded(self, keys: np.ndarray) -> np.ndarray:
        width = keys.shape[-1]
        return v4_records.values(
            v4_records.records(keys.astype(np.float32).reshape(-1, width))
        ).reshape(keys.shape)

    def put(self, keys: np.ndarray) -> Any:
        *outer, width = keys.shape
        flat = keys.astype(np.float32).reshape(-1, width)
        written = np.isfinite(flat).all(axis=1)
        # NaN in every place that is not written
        found = np.full((len(flat), v4_record_bytes(width, ROPE)), 0xFF, np.uint8)
        found[written] = v4_records.records(flat[written])
        return self.m.put(found.reshape(*outer, -1))


class InRecordsInTiles(InRecords, AttendedInTiles):
    """Records of several tiles."""


@pytest.mark.parametrize("made", [InRecords, InRecordsInTiles])
@pytest.mark.parametrize("selects", [None, False, True])
@pytest.mark.parametrize(
    ("kind", "heads", "width"),
    # of the last the bytes are a multiple of 8 and not of 16, as of released models
    [("float32", 8, 32), ("bfloat16", 20, 64), ("bfloat16", 3, 128)],
)
def test_attention_to_records(
    kind: str,
    heads: int,
    width: int,
    selects: bool | None,
    made: type[InRecords],
    paddle_memory: KernelMemory,
) -> None:
    m, case = paddle_memory, made(paddle_memory, kind, heads, width)
    entries = None
    if selects is not None:
        pool = case.put(case.pool)
        entries = Entries(pool, case.ratio, m.put(case.slots) if selects else None)
    shared = m.put(case.sinks), m.put(COS_SIN), case.places, EPS, new_partials(width, m.poisoned)
    found = block_fp8.get(m, attend_v4(case.q, case.windows, entries, *shared))
    wanted = np.stack([case.wanted(token, selects) for token in range(len(case.rows))])
    check(found.reshape(wanted.shape), wanted, kind)
