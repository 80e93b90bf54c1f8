"""The kernel of the indexer's query: the CPU's bytes and the oracle's values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import LaunchError, ShapeError
from fd_dsa.ops.query import paddle_impl
from tests.kernel_memory import KernelMemory
from tests.ops.cache_write_case import FORMATS, extreme_rows
from tests.reference.bfloat16 import ref_array, ref_bits, upper_half
from tests.reference.fp8 import ref_hadamard, ref_index_key
from tests.reference.rope import ref_rotate

Outputs = tuple[np.ndarray, np.ndarray]


def inputs(num_tokens: int, heads: int, width: int = 128, seed: int = 0) -> list[np.ndarray]:
    """q, weights, position_ids and cos_sin_cache."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-3, 3, (num_tokens + 3, width // 4))
    return [
        rng.standard_normal((num_tokens, heads, width)).astype(np.float32),
        rng.standard_normal((num_tokens, heads)).astype(np.float32),
        rng.integers(0, len(angles), num_tokens),
        np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
    ]


def settings(params: dict[str, Any], quantized: bool) -> dict[str, Any]:
    """Keyword arguments of `prepare_indexer_query` from those of a cache write."""
    return {
        "rope_interleave": params.get("index_rope_interleave", False),
        "hadamard": params.get("index_hadamard", False),
        "scale_fmt": params.get("index_scale_fmt", "ue8m0"),
        "weights_scale": 0.0110485435,
        "quantized": quantized,
    }


def on_cpu(given: list[np.ndarray], **how: Any) -> Outputs:
    """Codes (or rotated queries) and weights as the CPU makes them."""
    dtype = np.uint8 if how["quantized"] else np.float32
    out = np.zeros(given[0].shape, dtype), np.zeros(given[1].shape, np.float32)
    with np.errstate(all="ignore"):
        copies = (None if array is None else array.copy() for array in given)
        return paddle_impl.prepare_indexer_query(*copies, out=out, **how)


def in_kernel(
    m: KernelMemory, given: list[np.ndarray], dtype: str = "float32", **how: Any
) -> Outputs:
    """The same in the kernel, written over poison."""
    from fd_dsa.ops.query.triton_kernel import prepare_indexer_query

    codes = "float8_e4m3fn" if how["scale_fmt"] else "uint8"
    out = (
        m.poisoned(given[0].shape, codes if how["quantized"] else dtype),
        m.poisoned(given[1].shape, "float32"),
    )
    if dtype == "bfloat16":
        q, weights = (m.put(upper_half(x).view(np.uint16), dtype) for x in given[:2])
    else:
        q, weights = m.put(given[0]), m.put(given[1])
    with np.errstate(all="ignore"):
        positions = None if given[2] is None else m.put(given[2])
        prepare_indexer_query(q, weights, positions, m.put(given[3]), out=out, **how)
    return m.get(out[0]), m.get(out[1])


def assert_equal(found: Outputs, wanted: Outputs) -> None:
    """Same codes and the same bits of the weights."""
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


def shapes(m: KernelMemory) -> tuple[tuple[int, int], ...]:
    """(tokens, heads): programs that are not full, token borders inside one, real sizes."""
    return ((1, 64), (129, 64), (1025, 32), (33, 7)) if m.large else ((1, 16), (5, 7))


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("params", FORMATS.values(), ids=FORMATS.keys())
def test_bytes_are_those_of_the_cpu(
    kernel_memory: KernelMemory, params: dict[str, Any], quantized: bool
) -> None:
    how = settings(params, quantized)
    for shape in shapes(kernel_memory):
        given = inputs(*shape)
        assert_equal(in_kernel(kernel_memory, given, **how), on_cpu(given, **how))


@pytest.mark.parametrize("interleaved", [False, True])
def test_cos_and_sin_gathered_before(kernel_memory: KernelMemory, interleaved: bool) -> None:
    how = settings({"index_rope_interleave": interleaved}, True)
    for shape in shapes(kernel_memory):
        q, weights, positions, table = inputs(*shape)
        wanted = on_cpu([q, weights, positions, table], **how)
        gathered: list[Any] = [q, weights, None, table[positions]]
        assert_equal(on_cpu(gathered, **how), wanted)
        assert_equal(in_kernel(kernel_memory, gathered, **how), wanted)


@pytest.mark.parametrize("heads", [16, 7])
def test_positions_past_the_table_read_its_ends(kernel_memory: KernelMemory, heads: int) -> None:
    given, how = inputs(4, heads), settings({}, True)
    last = len(given[3]) - 1
    wild, ends = given.copy(), given.copy()
    wild[2] = np.array([-1, -(2**50), last + 1, 2**50])
    ends[2] = np.array([0, 0, last, last])
    assert_equal(in_kernel(kernel_memory, wild, **how), on_cpu(ends, **how))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("quantized", [True, False])
def test_bfloat16_queries(kernel_memory: KernelMemory, quantized: bool, interleaved: bool) -> None:
    how = settings({"index_rope_interleave": interleaved}, quantized)
    given = inputs(*shapes(kernel_memory)[1])
    given[:2] = [ref_array(array) for array in given[:2]]
    found = in_kernel(kernel_memory, given, "bfloat16", **how)
    query, weights = on_cpu(given, **how)
    if not quantized:
        query = np.vectorize(ref_bits, otypes=[np.uint16])(query)
    assert_equal(found, (query, weights))


@pytest.mark.parametrize("interleaved", [False, True])
def test_values_are_those_of_float64(kernel_memory: KernelMemory, interleaved: bool) -> None:
    given = inputs(2, 3)
    how = settings({"index_hadamard": True, "index_rope_interleave": interleaved}, False)
    query, weights = in_kernel(kernel_memory, given, **how)
    np.testing.assert_allclose(weights, given[1] * 0.0110485435, rtol=1e-6)
    for t, h in np.ndindex(2, 3):
        wanted = given[0][t, h].astype(float)
        cos, sin = np.split(given[3][given[2][t]].astype(float), 2)
        wanted[:64] = ref_rotate(wanted[:64], np.arctan2(sin, cos), interleaved)
        np.testing.assert_allclose(query[t, h], ref_hadamard(wanted), rtol=0, atol=3e-6)


@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_extreme_numbers(kernel_memory: KernelMemory, scale_fmt: str | None) -> None:
    rows = extreme_rows(128)
    given = inputs(len(rows), 2)
    given[0][:] = rows[:, None]
    # no rotation: codes can be known from the values
    given[3][:, :32], given[3][:, 32:] = 1.0, 0.0
    finite = np.isfinite(rows).all(1)
    how = settings({"index_scale_fmt": scale_fmt}, True)
    codes, weights = in_kernel(kernel_memory, given, **how)
    assert_equal((codes, weights), on_cpu(given, **how))
    for t in np.flatnonzero(finite):
        wanted, scale = ref_index_key(rows[t], scale_fmt)
        # a zero may have got the other sign from x * 1 - y * 0
        np.testing.assert_array_equal(codes[t, 0] & 0x7F, wanted & 0x7F, str(t))
        weight = given[1][t, 0] * np.float32(0.0110485435) * scale
        assert weights[t, 0] == weight


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_do(kernel_memory: KernelMemory, shape: tuple[int, int]) -> None:
    codes, weights = in_kernel(kernel_memory, inputs(*shape), **settings({}, True))
    assert codes.size == weights.size == 0


def test_memory_is_made_where_none_is_given(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.query.triton_kernel import prepare_indexer_query

    m, given = kernel_memory, inputs(2, 4)
    if m.name == "torch":
        pytest.skip("results are allocated by Paddle")
    for quantized in (True, False):
        how = settings({}, quantized)
        found = prepare_indexer_query(*(m.put(x) for x in given), out=None, **how)
        assert_equal(tuple(m.get(x) for x in found), on_cpu(given, **how))


def test_refusals(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.query.triton_kernel import prepare_indexer_query

    m, given = kernel_memory, inputs(2, 4)
    out = m.poisoned((2, 4, 128), "uint8"), m.poisoned((2, 4), "float32")
    q, weights, positions, angles = (m.put(array) for array in given)
    how = settings({}, True)
    with pytest.raises(ShapeError, match=r"index_head_dim = 2 . rope_dim.*got 128 and 32"):
        narrow = m.put(given[3][:, :32])
        prepare_indexer_query(q, weights, positions, narrow, out=out, **how)
    with pytest.raises(ShapeError, match="cos_sin_cache has no row"):
        prepare_indexer_query(q, weights, positions, angles[:0], out=out, **how)
    with pytest.raises(LaunchError, match="q_ptr"):
        wide = m.put(np.zeros((2, 4, 130), np.float32))[..., :128]
        prepare_indexer_query(wide, weights, positions, angles, out=out, **how)
