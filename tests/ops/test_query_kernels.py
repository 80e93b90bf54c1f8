"""The kernels of both queries, the indexer's and MLA's: the CPU's bytes and the oracle's values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fd_dsa.errors import LaunchError, ShapeError
from fd_dsa.ops.mla_query import prepare_mla_query
from fd_dsa.ops.query import prepare_on_host
from tests.kernel_memory import POISON, KernelMemory
from tests.ops.cache_write_case import FORMATS, extreme_rows
from tests.reference.bfloat16 import ref_array, ref_bits, upper_half
from tests.reference.fp8 import ref_hadamard, ref_index_key
from tests.reference.rope import ref_rotate

RANK, ROPE, DIM, SCALE = 512, 64, 128, 0.0110485435
Inputs = list[Any]
EXAMPLES = settings(
    max_examples=min(15, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random_inputs(num_tokens: int, rope: int, *shapes: tuple[int, ...]) -> Inputs:
    """Normal values of each shape, then position_ids and cos_sin_cache."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(-3, 3, (num_tokens + 3, rope // 2))
    return [
        *(rng.standard_normal((num_tokens, *shape)).astype(np.float32) for shape in shapes),
        rng.integers(0, len(angles), num_tokens),
        np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
    ]


def activations(m: KernelMemory, array: np.ndarray, dtype: str) -> Any:
    """float32, or the bfloat16 numbers that the values are."""
    return m.put(upper_half(array).view(np.uint16), dtype) if dtype == "bfloat16" else m.put(array)


class IndexerQuery:
    """RoPE, Hadamard, quantisation and the fold of the scales.

    Args:
        params: fields of CacheWriteParams.
    """

    def __init__(self, params: dict[str, Any] | None = None, quantized: bool = True) -> None:
        params = params or {}
        self.how = {
            "rope_interleave": params.get("index_rope_interleave", False),
            "hadamard": params.get("index_hadamard", False),
            "scale_fmt": params.get("index_scale_fmt", "ue8m0"),
            "weights_scale": SCALE,
            "quantized": quantized,
        }

    def inputs(self, num_tokens: int, heads: int) -> Inputs:
        """q, weights, position_ids and cos_sin_cache."""
        return random_inputs(num_tokens, ROPE, (heads, DIM), (heads,))

    def on_cpu(self, inputs: Inputs) -> list[np.ndarray]:
        """Codes (or rotated queries) and weights."""
        dtype = np.uint8 if self.how["quantized"] else np.float32
        out = np.zeros(inputs[0].shape, dtype), np.zeros(inputs[1].shape, np.float32)
        with np.errstate(all="ignore"):
            copies = (None if array is None else array.copy() for array in inputs)
            return list(prepare_on_host(*copies, out=out, **self.how))

    def in_kernel(
        self, m: KernelMemory, inputs: Inputs, dtype: str = "float32"
    ) -> list[np.ndarray]:
        """The same in the kernel, written over poison."""
        from fd_dsa.ops.query_kernels import prepare_indexer_query

        codes = "float8_e4m3fn" if self.how["scale_fmt"] else "uint8"
        out = (
            m.poisoned(inputs[0].shape, codes if self.how["quantized"] else dtype),
            m.poisoned(inputs[1].shape, "float32"),
        )
        parts = [activations(m, array, dtype) for array in inputs[:2]]
        parts += [None if array is None else m.put(array) for array in inputs[2:]]
        with np.errstate(all="ignore"):
            assert prepare_indexer_query(*parts, out=out, **self.how) is out
        return [m.get(out[0]), m.get(out[1])]

    def rounded(self, results: list[np.ndarray]) -> list[np.ndarray]:
        """Return the expected results for bfloat16: rotated queries, rounded once."""
        query, weights = results
        return results if self.how["quantized"] else [bfloat16_bits(query), weights]


class MlaQuery:
    """The latent part, then the rotated part."""

    def __init__(self, rank: int = RANK, rope: int = ROPE) -> None:
        self.rank, self.rope = rank, rope

    def inputs(self, num_tokens: int, heads: int) -> Inputs:
        """q_latent, q_pe, position_ids and cos_sin_cache."""
        return random_inputs(num_tokens, self.rope, (heads, self.rank), (heads, self.rope))

    def on_cpu(self, inputs: Inputs) -> list[np.ndarray]:
        return [prepare_mla_query(*inputs)]

    def in_kernel(
        self, m: KernelMemory, inputs: Inputs, dtype: str = "float32"
    ) -> list[np.ndarray]:
        """The query that the kernel writes over poison, of views as a model has them."""
        q_latent, q_pe, *angles = inputs
        # a GEMM for each head writes [heads, tokens, ...]
        by_head = activations(m, np.ascontiguousarray(q_latent.transpose(1, 0, 2)), dtype)
        # the rotated values are the end of wider heads
        wide = np.concatenate([np.full_like(q_pe, 3), q_pe], axis=-1)
        views = (
            by_head.permute(1, 0, 2) if m.name == "torch" else by_head.transpose([1, 0, 2]),
            activations(m, wide, dtype)[:, :, q_pe.shape[-1] :],
        )
        out = m.poisoned((*q_pe.shape[:2], q_latent.shape[2] + q_pe.shape[2]), dtype)
        angles = [None if array is None else m.put(array) for array in angles]
        assert mla_kernel(m, *views, *angles, out) is out
        return [m.get(out)]

    def rounded(self, results: list[np.ndarray]) -> list[np.ndarray]:
        return [bfloat16_bits(results[0])]


def mla_kernel(m: KernelMemory, *arguments: Any) -> Any:
    """Call the kernel, without a selection if the interpreter has the tensors on a CPU."""
    from fd_dsa.ops import query_kernels

    if m.name != "interpreter":
        return prepare_mla_query(*arguments)
    return query_kernels.prepare_mla_query(*arguments)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    return np.vectorize(ref_bits, otypes=[np.uint16])(values)


def assert_equal(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """The same bytes."""
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


def shapes(m: KernelMemory) -> tuple[tuple[int, int], ...]:
    """(tokens, heads): tensor parallelism, programs that are not full, token borders inside one."""
    if m.large:
        return ((1, 128), (1024, 64), (1025, 32), (33, 32), (129, 16), (4097, 128), (33, 7))
    return ((3, 32), (1, 16), (5, 7), (1, 1))


QUERIES: dict[str, Any] = {
    **{
        f"{name}, {'codes' if quantized else 'rotated'}": IndexerQuery(params, quantized)
        for name, params in FORMATS.items()
        for quantized in (True, False)
    },
    "mla": MlaQuery(),
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_bytes_are_those_of_the_cpu(kernel_memory: KernelMemory, query: Any) -> None:
    for shape in shapes(kernel_memory):
        inputs = query.inputs(*shape)
        wanted = query.on_cpu(inputs)
        assert_equal(query.in_kernel(kernel_memory, inputs), wanted)
        # cos and sin gathered before
        *parts, positions, table = inputs
        gathered = [*parts, None, table[positions]]
        assert_equal(query.on_cpu(gathered), wanted)
        assert_equal(query.in_kernel(kernel_memory, gathered), wanted)


@pytest.mark.parametrize(
    "name",
    [
        "half-split, codes",
        "half-split, rotated",
        "interleaved, codes",
        "interleaved, rotated",
        "mla",
    ],
)
def test_bfloat16_queries(kernel_memory: KernelMemory, name: str) -> None:
    query = MlaQuery(64, 16) if name == "mla" else QUERIES[name]
    for shape in ((129, 64), (33, 7)) if kernel_memory.large else ((5, 7), (2, 16)):
        inputs = query.inputs(*shape)
        inputs[:2] = [ref_array(part) for part in inputs[:2]]
        found = query.in_kernel(kernel_memory, inputs, "bfloat16")
        assert_equal(found, query.rounded(query.on_cpu(inputs)))


@pytest.mark.parametrize("heads", [16, 7])
@pytest.mark.parametrize("query", [IndexerQuery(), MlaQuery()])
def test_positions_past_the_table_read_its_ends(
    kernel_memory: KernelMemory, query: Any, heads: int
) -> None:
    wild, ends = query.inputs(4, heads), query.inputs(4, heads)
    last = len(wild[3]) - 1
    wild[2] = np.array([-1, -(2**50), last + 1, 2**50])
    ends[2] = np.array([0, 0, last, last])
    assert_equal(query.in_kernel(kernel_memory, wild), query.on_cpu(ends))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("query", [IndexerQuery(), MlaQuery()])
def test_nothing_to_do(kernel_memory: KernelMemory, query: Any, shape: tuple[int, int]) -> None:
    inputs = query.inputs(*shape)
    for result in (query.on_cpu(inputs), query.in_kernel(kernel_memory, inputs)):
        assert all(part.shape[:2] == shape for part in result)


@EXAMPLES
@given(
    num_tokens=st.integers(1, 5),
    heads=st.integers(1, 9),
    rank=st.sampled_from([2, 6, 62, 130]),
    rope=st.sampled_from([2, 4, 16, 64]),
    gathered=st.booleans(),
)
def test_any_widths_of_mla(
    kernel_memory: KernelMemory, num_tokens: int, heads: int, rank: int, rope: int, gathered: bool
) -> None:
    query = MlaQuery(rank, rope)
    inputs = query.inputs(num_tokens, heads)
    if gathered:
        inputs[2:] = [None, inputs[3][inputs[2]]]
    assert_equal(query.in_kernel(kernel_memory, inputs), query.on_cpu(inputs))


def test_mla_on_a_cpu() -> None:
    import paddle

    inputs = MlaQuery(6, 4).inputs(3, 2)
    q_latent, q_pe, positions, table = inputs
    before, found = [array.copy() for array in inputs], prepare_mla_query(*inputs)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[..., :6], q_latent)
    for t, h in np.ndindex(3, 2):
        cos, sin = np.split(table[positions[t]].astype(float), 2)
        wanted = ref_rotate(q_pe[t, h].astype(float), np.arctan2(sin, cos), True)
        np.testing.assert_allclose(found[t, h, 6:], wanted, rtol=0, atol=1e-6)
    out = paddle.full([3, 2, 10], np.nan)
    assert prepare_mla_query(*map(paddle.to_tensor, inputs), out) is out
    np.testing.assert_array_equal(out.numpy(), found)
    by_head = np.ascontiguousarray(q_latent.transpose(1, 0, 2)).transpose(1, 0, 2)
    wide = np.concatenate([q_pe, q_pe], axis=-1)[..., 4:]
    np.testing.assert_array_equal(prepare_mla_query(by_head, wide, positions, table), found)
    for array, kept in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_memory_for_mla_is_made_where_none_is_given(kernel_memory: KernelMemory) -> None:
    m, inputs = kernel_memory, MlaQuery().inputs(2, 4)
    found = mla_kernel(m, *map(m.put, inputs), None)
    np.testing.assert_array_equal(m.get(found), prepare_mla_query(*inputs))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_values_are_those_of_float64(
    kernel_memory: KernelMemory, interleaved: bool
) -> None:
    params = {"index_hadamard": True, "index_rope_interleave": interleaved}
    query = IndexerQuery(params, quantized=False)
    q, weights, positions, table = inputs = query.inputs(2, 3)
    found, folded = query.in_kernel(kernel_memory, inputs)
    np.testing.assert_allclose(folded, weights * SCALE, rtol=1e-6)
    for t, h in np.ndindex(2, 3):
        wanted = q[t, h].astype(float)
        cos, sin = np.split(table[positions[t]].astype(float), 2)
        wanted[:64] = ref_rotate(wanted[:64], np.arctan2(sin, cos), interleaved)
        np.testing.assert_allclose(found[t, h], ref_hadamard(wanted), rtol=0, atol=3e-6)


@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
def test_codes_of_extreme_numbers(kernel_memory: KernelMemory, scale_fmt: str | None) -> None:
    rows, query = extreme_rows(DIM), IndexerQuery({"index_scale_fmt": scale_fmt})
    inputs = query.inputs(len(rows), 2)
    inputs[0][:] = rows[:, None]
    # no rotation: codes can be known from the values
    inputs[3][:, :32], inputs[3][:, 32:] = 1.0, 0.0
    found = codes, weights = query.in_kernel(kernel_memory, inputs)
    assert_equal(found, query.on_cpu(inputs))
    for t in np.flatnonzero(np.isfinite(rows).all(1)):
        wanted, scale = ref_index_key(rows[t], scale_fmt)
        # a zero may have got the other sign from x * 1 - y * 0
        np.testing.assert_array_equal(codes[t, 0] & 0x7F, wanted & 0x7F, str(t))
        assert weights[t, 0] == inputs[1][t, 0] * np.float32(SCALE) * scale


def test_what_the_kernels_cannot_read_is_refused(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.query_kernels import prepare_indexer_query

    m = kernel_memory
    mla_out = m.poisoned((2, 3, 12), "float32")
    index_out = m.poisoned((2, 4, DIM), "uint8"), m.poisoned((2, 4), "float32")

    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        if "q" in changes or "angles" in changes:
            names, inputs = ("q", "weights", "positions", "angles"), IndexerQuery().inputs(2, 4)
            arguments = dict(zip(names, map(m.put, inputs), strict=True)) | changes
            with pytest.raises(error, match=message):
                prepare_indexer_query(*arguments.values(), out=index_out, **IndexerQuery().how)
        else:
            names, inputs = ("q_latent", "q_pe", "positions", "table"), MlaQuery(8, 4).inputs(2, 3)
            arguments = dict(zip(names, map(m.put, inputs), strict=True)) | {"out": mla_out}
            with pytest.raises(error, match=message):
                mla_kernel(m, *(arguments | changes).values())
        for out in (mla_out, *index_out):
            assert (m.get(out).view(np.uint8) == POISON).all()

    def zeros(*shape: int) -> Any:
        return m.put(np.zeros(shape, np.float32))

    refused(ShapeError, r"index_head_dim = 2 . rope_dim.*got 128 and 32", angles=zeros(5, 32))
    refused(LaunchError, "q_ptr", q=zeros(2, 4, 130)[..., :DIM])
    refused(ShapeError, "values of a row of q_pe are 2 apart", q_pe=zeros(2, 3, 8)[:, :, ::2])
    refused(ShapeError, "heads of q_pe are .* both even", q_pe=zeros(2, 3, 5)[:, :, :4])
    refused(ShapeError, "heads of q_pe are .* both even", q_pe=zeros(2, 3, 6)[:, :, 1:5])
    refused(LaunchError, "out_ptr", out=zeros(2, 3, 14)[:, :, :12])
    odd = {"q_latent": zeros(2, 3, 5), "q_pe": zeros(2, 3, 4), "out": zeros(2, 3, 9)}
    refused(ShapeError, "an even kv_lora_rank, got 4 and 5", **odd)
    six = {"q_latent": zeros(2, 3, 6), "q_pe": zeros(2, 3, 6), "table": zeros(5, 6)}
    refused(ShapeError, "a power of two as rope_dim .* got 6 and 6", **six)
