"""Gathered index keys: every row from its own page, reserved rows left alone; CPU and kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.ops.indexer_gather import gather_indexer_keys
from tests.kernel_memory import POISON, KernelMemory
from tests.strategies import StepBatch, make_batch, step_batches

# (encoder, decoder, this_time): first chunk, idle, decode, later chunk, drafts, a full block
ROWS = [(70, 0, 70), (0, 0, 0), (0, 100, 1), (5, 130, 5), (0, 7, 0), (0, 9, 3), (64, 0, 64)]
DTYPES = ("uint8", "float32", "int16")


class Keys:
    """A random indexer cache, and outputs of POISON for a step.

    Attributes:
        cache: as `gather_indexer_keys` takes it.
        cu: int32 [num_rows + 1]; prefix sums of the gathered keys.
        num_keys: rows of the outputs, some more than are filled.
    """

    def __init__(self, batch: StepBatch, dtype: str, width: int = 128, spare: int = 3) -> None:
        self.batch, self.dtype, rng = batch, np.dtype(dtype), np.random.default_rng(1)
        row = 132 if dtype == "uint8" else width
        size = batch.num_blocks * batch.block_size * row
        raw = rng.integers(0, 256, size * self.dtype.itemsize, np.uint8)
        self.cache = raw.view(self.dtype).reshape(batch.num_blocks, batch.block_size, row)
        self.width = 128 if dtype == "uint8" else width
        encoder, decoder, this_time = batch.inputs()[:3]
        gathered = np.where(encoder > 0, decoder + this_time, this_time)
        self.cu = np.concatenate([[0], np.cumsum(gathered)]).astype(np.int32)
        self.num_keys = int(self.cu[-1]) + spare

    def outputs(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Keys and scales of POISON."""
        raw = np.full(self.num_keys * self.width * self.dtype.itemsize, POISON, np.uint8)
        keys = raw.view(self.dtype).reshape(self.num_keys, self.width)
        scales = np.full(4 * self.num_keys, POISON, np.uint8).view(np.float32)
        return keys, scales if self.dtype == np.uint8 else None

    def arguments(self) -> tuple[np.ndarray, ...]:
        """The four inputs."""
        return self.cache, self.batch.block_tables, self.cu, self.batch.seq_lens_encoder

    def wanted(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The outputs, key by key."""
        keys, scales = self.outputs()
        block_size = self.batch.block_size
        for row in range(self.batch.num_rows):
            if self.batch.seq_lens_encoder[row] == 0:
                continue
            for position in range(self.cu[row + 1] - self.cu[row]):
                block = self.cache[self.batch.block_tables[row, position // block_size]]
                offset, to = position % block_size, self.cu[row] + position
                if scales is None:
                    keys[to] = block[offset]
                    continue
                flat = block.reshape(-1)
                keys[to] = flat[offset * 128 : offset * 128 + 128]
                scales[to] = flat[block_size * 128 :].view(np.float32)[offset]
        return keys, scales


def in_kernel(m: KernelMemory, keys: Keys) -> tuple[np.ndarray, np.ndarray | None]:
    """The outputs of the kernel."""
    from fd_dsa.ops.indexer_gather.triton_kernel import gather_indexer_keys as gather

    out_k, out_scale = keys.outputs()
    out_k, out_scale = m.put(out_k), None if out_scale is None else m.put(out_scale)
    gather(*(m.put(array) for array in keys.arguments()), out_k, out_scale)
    return m.get(out_k), None if out_scale is None else m.get(out_scale)


def assert_equal(found: Any, wanted: Any) -> None:
    """The same bytes."""
    for left, right in zip(found, wanted, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


@given(step_batches(), st.sampled_from(DTYPES))
@settings(max_examples=60)
def test_every_row_comes_from_its_page(batch: StepBatch, dtype: str) -> None:
    keys = Keys(batch, dtype, width=8)
    out = keys.outputs()
    gather_indexer_keys(*keys.arguments(), *out)
    assert_equal(out, keys.wanted())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_kernel_gathers_a_mixed_step(
    kernel_memory: KernelMemory, dtype: str, block_size: int
) -> None:
    rows = ROWS + [(3, i, 3) for i in range(40)] if kernel_memory.large else ROWS
    keys = Keys(make_batch(rows, block_size), dtype)
    assert_equal(in_kernel(kernel_memory, keys), keys.wanted())


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 0, 1)],
        [(0, 50, 1)] * 3,
        [(0, 0, 0)],
        [(1, 0, 1), (2, 1, 2)],
        [(0, 70, 1)] * 2 + [(130, 0, 130)],
        [(200, 64, 200)],
    ],
)
def test_kernel_gathers_edges(kernel_memory: KernelMemory, rows: list[Any]) -> None:
    keys = Keys(make_batch(rows, 64), "uint8", spare=0)
    assert_equal(in_kernel(kernel_memory, keys), keys.wanted())


def test_kernel_skips_pages_that_are_none(kernel_memory: KernelMemory) -> None:
    keys = Keys(make_batch([(150, 0, 150)], 64), "uint8")
    wanted, untouched = keys.wanted(), keys.outputs()
    keys.batch.block_tables[0, 1] = 10**6
    found = in_kernel(kernel_memory, keys)
    for left, right, poison in zip(found, wanted, untouched, strict=True):
        left, right, poison = (x.view(np.uint8).reshape(len(x), -1) for x in (left, right, poison))
        np.testing.assert_array_equal(left[:64], right[:64])
        np.testing.assert_array_equal(left[64:128], poison[64:128])
        np.testing.assert_array_equal(left[128:], right[128:])


def test_kernel_writes_no_row_past_its_outputs(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.indexer_gather.triton_kernel import gather_indexer_keys as gather

    # the sums say 134 keys, the outputs have 70 rows; what follows them belongs to others
    m, keys = kernel_memory, Keys(make_batch([(70, 0, 70), (64, 0, 64)], 64), "uint8", spare=0)
    out, wanted = [m.put(array) for array in keys.outputs()], keys.wanted()
    gather(*(m.put(array) for array in keys.arguments()), *(x[:70] for x in out))
    for found, right, poison in zip(map(m.get, out), wanted, keys.outputs(), strict=True):
        np.testing.assert_array_equal(found[:70].view(np.uint8), right[:70].view(np.uint8))
        np.testing.assert_array_equal(found[70:].view(np.uint8), poison[70:].view(np.uint8))


@pytest.mark.parametrize(
    ("place", "index", "value", "said"),
    [
        (1, (0, 1), -1, r"block_tables of row 0: page\[1\] is -1, allowed is 0 to"),
        (1, (3, 0), 10**6, r"block_tables of row 3: page\[0\] is 1000000"),
        (2, -1, 10**6, r"cu_seqlens_kg\[7\] is 1000000, allowed is 0 to"),
        (2, 0, -1, r"cu_seqlens_kg\[0\] is -1"),
        (2, slice(0, 1), 71, r"cu_seqlens_kg\[1\] is 70, allowed is at least the 71 before it"),
    ],
)
def test_a_cpu_refuses_values_and_writes_nothing(
    place: int, index: Any, value: int, said: str
) -> None:
    keys = Keys(make_batch(ROWS, 64), "uint8")
    arguments, out = [*keys.arguments()], keys.outputs()
    arguments[place] = arguments[place].copy()
    arguments[place][index] = value
    with pytest.raises(ValueError, match=f"gather_indexer_keys: {said}"):
        gather_indexer_keys(*arguments, *out)
    assert_equal(out, keys.outputs())


def test_a_cpu_refuses_more_keys_than_pages_hold() -> None:
    keys = Keys(make_batch([(70, 0, 70)], 64), "uint8")
    cache, tables, cu, encoder = keys.arguments()
    with pytest.raises(ValueError, match=r"row 0 has 70 keys, its 1 pages .* hold 64"):
        gather_indexer_keys(cache, tables[:, :1], cu, encoder, *keys.outputs())


def test_pages_of_rows_that_gather_nothing_may_be_anything() -> None:
    keys = Keys(make_batch(ROWS, 64), "uint8")
    keys.batch.block_tables[2] = -1
    out = keys.outputs()
    gather_indexer_keys(*keys.arguments(), *out)
    assert_equal(out, keys.wanted())


@pytest.mark.parametrize("place", [0, 1])
def test_a_cpu_refuses_outputs_that_are_read_only(place: int) -> None:
    keys = Keys(make_batch(ROWS, 64), "uint8")
    out = keys.outputs()
    out[place].setflags(write=False)
    said = ("out_k", "out_scale")[place]
    with pytest.raises(ValueError, match=f"gather_indexer_keys: {said} is read-only"):
        gather_indexer_keys(*keys.arguments(), *out)
    assert_equal(out, keys.outputs())


def test_codes_may_be_float8(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.indexer_gather.triton_kernel import gather_indexer_keys as gather

    m, keys = kernel_memory, Keys(make_batch([(70, 3, 70)], 64), "uint8")
    out = m.poisoned((keys.num_keys, 128), "float8_e4m3fn"), m.put(keys.outputs()[1])
    gather(*(m.put(array) for array in keys.arguments()), *out)
    assert_equal([m.get(x) for x in out], keys.wanted())


@pytest.mark.parametrize(
    ("place", "value", "error", "said"),
    [
        (0, np.zeros((4, 64, 132), np.int32), DtypeError, "index_cache has dtype int32"),
        (0, np.zeros((4, 64, 128), np.uint8), ShapeError, "index_cache has shape"),
        (0, np.zeros((4, 64, 128), np.float32), DtypeError, "out_k has dtype uint8"),
        (1, np.zeros((7, 3), np.int64), DtypeError, "block_tables has dtype int64"),
        (2, np.zeros(7, np.int32), ShapeError, r"cu_seqlens_kg has shape \[7\].*\[8\]"),
        (3, np.zeros(8, np.int32), ShapeError, "seq_lens_encoder has shape"),
        (4, np.zeros((9, 64), np.uint8), ShapeError, "out_k has shape"),
        (1, None, ShapeError, "block_tables is None"),
        (2, [0] * 8, ShapeError, "cu_seqlens_kg is a list"),
        (5, None, ShapeError, "out_scale is missing for a cache of uint8"),
        (5, np.zeros(3, np.float32), ShapeError, r"out_scale has shape \[3\]"),
    ],
)
def test_refusals(place: int, value: Any, error: type, said: str) -> None:
    keys = Keys(make_batch(ROWS, 64), "uint8")
    arguments = [*keys.arguments(), *keys.outputs()]
    arguments[place] = value
    with pytest.raises(error, match=said):
        gather_indexer_keys(*arguments)
