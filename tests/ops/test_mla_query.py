"""The absorbed query: the formula on a CPU, the CPU's bytes in the kernel, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fd_dsa.errors import DtypeError, LaunchError, ShapeError
from fd_dsa.ops.mla_query import prepare_mla_query
from tests.kernel_memory import POISON, KernelMemory
from tests.reference.bfloat16 import ref_array, ref_bits, upper_half
from tests.reference.rope import ref_rotate

RANK, ROPE = 512, 64
EXAMPLES = settings(
    max_examples=min(15, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def inputs(
    num_tokens: int, heads: int, rank: int = RANK, rope: int = ROPE, seed: int = 0
) -> list[np.ndarray]:
    """q_latent, q_pe, position_ids and cos_sin_cache."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-3, 3, (num_tokens + 3, rope // 2))
    return [
        rng.standard_normal((num_tokens, heads, rank)).astype(np.float32),
        rng.standard_normal((num_tokens, heads, rope)).astype(np.float32),
        rng.integers(0, len(angles), num_tokens),
        np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
    ]


def as_end_of_heads(m: KernelMemory, array: np.ndarray, dtype: str | None) -> Any:
    """The last values of heads that are twice as wide."""
    wide = np.concatenate([np.full_like(array, 3), array], axis=-1)
    return m.put(wide, dtype)[:, :, array.shape[-1] :]


def in_kernel(m: KernelMemory, given: list[Any], dtype: str = "float32") -> np.ndarray:
    """The query that the kernel writes over poison, of views as a model has them."""
    q_latent, q_pe, positions, table = given
    if dtype == "bfloat16":
        q_latent, q_pe = (upper_half(part).view(np.uint16) for part in (q_latent, q_pe))
    named = dtype if dtype == "bfloat16" else None
    shape = (*q_latent.shape[:2], q_latent.shape[2] + q_pe.shape[2])
    out = m.poisoned(shape, dtype)
    found = call(
        m,
        as_projected(m, q_latent, named),
        as_end_of_heads(m, q_pe, named),
        None if positions is None else m.put(positions),
        m.put(table),
        out,
    )
    assert found is out
    return m.get(out)


def as_projected(m: KernelMemory, array: np.ndarray, dtype: str | None) -> Any:
    """A transposed view of a tensor [heads, tokens, ...], as a GEMM for each head writes it."""
    by_head = m.put(np.ascontiguousarray(array.transpose(1, 0, 2)), dtype)
    return by_head.permute(1, 0, 2) if m.name == "torch" else by_head.transpose([1, 0, 2])


def call(m: KernelMemory, *arguments: Any) -> Any:
    """The kernel; in the interpreter, whose tensors are on a CPU, without choosing a provider."""
    from fd_dsa.ops.mla_query import triton_kernel

    if m.name != "interpreter":
        return prepare_mla_query(*arguments)
    return triton_kernel.prepare_mla_query(*arguments)


def on_cpu(given: list[Any]) -> np.ndarray:
    """The same on a CPU."""
    return prepare_mla_query(*given)


def shapes(m: KernelMemory) -> tuple[tuple[int, int], ...]:
    """(tokens, heads): those of tensor parallelism, programs that are not full, real sizes."""
    if m.large:
        return ((1, 128), (128, 128), (1024, 64), (33, 32), (129, 16), (4097, 128), (7, 3))
    return ((1, 128), (2, 64), (3, 32), (2, 16), (5, 7), (1, 1))


def test_on_a_cpu_against_the_formula() -> None:
    q_latent, q_pe, positions, table = inputs(3, 2, 6, 4)
    found = prepare_mla_query(q_latent, q_pe, positions, table)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[..., :6], q_latent)
    for t, h in np.ndindex(3, 2):
        cos, sin = np.split(table[positions[t]].astype(float), 2)
        wanted = ref_rotate(q_pe[t, h].astype(float), np.arctan2(sin, cos), True)
        np.testing.assert_allclose(found[t, h, 6:], wanted, rtol=0, atol=1e-6)


def test_on_a_cpu_inputs_stay_and_out_is_filled() -> None:
    import paddle

    given = inputs(3, 2, 6, 4)
    wanted, before = on_cpu(given), [array.copy() for array in given]
    out = paddle.full([3, 2, 10], np.nan)
    assert prepare_mla_query(*map(paddle.to_tensor, given), out) is out
    np.testing.assert_array_equal(out.numpy(), wanted)
    by_head = np.ascontiguousarray(given[0].transpose(1, 0, 2)).transpose(1, 0, 2)
    wide = np.concatenate([given[1], given[1]], axis=-1)[..., 4:]
    np.testing.assert_array_equal(on_cpu([by_head, wide, *given[2:]]), wanted)
    for array, kept in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_bytes_are_those_of_the_cpu(kernel_memory: KernelMemory) -> None:
    for shape in shapes(kernel_memory):
        given = inputs(*shape)
        np.testing.assert_array_equal(in_kernel(kernel_memory, given), on_cpu(given))


@EXAMPLES
@given(
    num_tokens=st.integers(1, 5),
    heads=st.integers(1, 9),
    rank=st.sampled_from([2, 6, 62, 130]),
    rope=st.sampled_from([2, 4, 16, 64]),
    gathered=st.booleans(),
)
def test_any_widths(
    kernel_memory: KernelMemory, num_tokens: int, heads: int, rank: int, rope: int, gathered: bool
) -> None:
    given = inputs(num_tokens, heads, rank, rope)
    if gathered:
        given[2:] = [None, given[3][given[2]]]
    np.testing.assert_array_equal(in_kernel(kernel_memory, given), on_cpu(given))


def test_bfloat16_queries(kernel_memory: KernelMemory) -> None:
    for shape in ((2, 16), (1, 3), (33, 128)) if kernel_memory.large else ((2, 16), (1, 3)):
        given = inputs(*shape, rank=64, rope=16)
        given[:2] = [ref_array(part) for part in given[:2]]
        wanted = np.vectorize(ref_bits, otypes=[np.uint16])(on_cpu(given))
        np.testing.assert_array_equal(in_kernel(kernel_memory, given, "bfloat16"), wanted)


def test_cos_and_sin_gathered_before(kernel_memory: KernelMemory) -> None:
    for shape in shapes(kernel_memory)[-2:]:
        q_latent, q_pe, positions, table = inputs(*shape)
        wanted = on_cpu([q_latent, q_pe, positions, table])
        gathered = [q_latent, q_pe, None, table[positions]]
        np.testing.assert_array_equal(on_cpu(gathered), wanted)
        np.testing.assert_array_equal(in_kernel(kernel_memory, gathered), wanted)


def test_positions_past_the_table_read_its_ends(kernel_memory: KernelMemory) -> None:
    wild, ends = inputs(4, 3), inputs(4, 3)
    last = len(wild[3]) - 1
    wild[2] = np.array([-1, -(2**50), last + 1, 2**50])
    ends[2] = np.array([0, 0, last, last])
    np.testing.assert_array_equal(in_kernel(kernel_memory, wild), on_cpu(ends))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_do(kernel_memory: KernelMemory, shape: tuple[int, int]) -> None:
    assert on_cpu(inputs(*shape)).shape == (*shape, RANK + ROPE)
    m, given = kernel_memory, inputs(*shape)
    out = m.poisoned((*shape, RANK + ROPE), "float32")
    assert call(m, *map(m.put, given), out) is out


def test_memory_is_made_where_none_is_given(kernel_memory: KernelMemory) -> None:
    m, given = kernel_memory, inputs(2, 4)
    found = call(m, *map(m.put, given), None)
    np.testing.assert_array_equal(m.get(found), on_cpu(given))


REFUSED = {
    "another type": (
        {0: np.zeros((2, 3, 6), np.float64)},
        DtypeError,
        "q_latent has dtype float64",
    ),
    "two types": ({1: np.zeros((2, 3, 4), np.float64)}, DtypeError, "q_pe has dtype float64"),
    "heads": ({1: np.zeros((2, 2, 4), np.float32)}, ShapeError, r"q_pe has shape \[2, 2, 4\]"),
    "flat": ({0: np.zeros((2, 18), np.float32)}, ShapeError, r"q_latent has shape \[2, 18\]"),
    "positions": ({2: np.zeros(3, np.int64)}, ShapeError, r"position_ids has shape \[3\]"),
    "int32": ({2: np.zeros(2, np.int32)}, DtypeError, "position_ids has dtype int32.*int64"),
    "no positions": ({2: None}, ShapeError, r"cos_sin_cache has shape \[5, 4\].*\[2, \*\]"),
    "narrow": ({3: np.zeros((5, 2), np.float32)}, ShapeError, r"cos_sin_cache.*\[\*, 4\]"),
    "wide": ({3: np.zeros((5, 8), np.float32)}, ShapeError, "cos_sin_cache has rows of 8"),
    "out": ({4: np.zeros((2, 3, 9), np.float32)}, ShapeError, r"out has shape \[2, 3, 9\]"),
    "out type": ({4: np.zeros((2, 3, 10), np.float64)}, DtypeError, "out has dtype float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    changes, error, said = REFUSED[name]
    given: list[Any] = [*inputs(2, 3, 6, 4), np.full((2, 3, 10), 7, np.float32)]
    for place, value in changes.items():
        given[place] = value
    with pytest.raises(error, match=f"^prepare_mla_query: {said}"):
        prepare_mla_query(*given)
    if 4 not in changes:
        assert (given[4] == 7).all()


def test_a_cpu_refuses_positions_outside_the_table_and_results_that_are_read_only() -> None:
    q_latent, q_pe, _, table = inputs(2, 3, 6, 4)
    out = np.full((2, 3, 10), 7, np.float32)
    with pytest.raises(ValueError, match=r"prepare_mla_query: position_ids\[1\] is 5.*0 to 4"):
        prepare_mla_query(q_latent, q_pe, np.array([0, 5]), table, out)
    assert (out == 7).all()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="prepare_mla_query: out is read-only"):
        prepare_mla_query(q_latent, q_pe, np.array([0, 4]), table, out)


def test_a_device_refuses_what_its_kernel_cannot_read(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    out = m.poisoned((2, 3, 12), "float32")

    def refused(error: type[Exception], said: str, **changes: Any) -> None:
        names = ("q_latent", "q_pe", "position_ids", "cos_sin_cache")
        arguments = dict(zip(names, map(m.put, inputs(2, 3, 8, 4)), strict=True)) | {"out": out}
        with pytest.raises(error, match=said):
            call(m, *(arguments | changes).values())
        assert (m.get(out).view(np.uint8) == POISON).all()

    def zeros(*shape: int) -> Any:
        return m.put(np.zeros(shape, np.float32))

    refused(ShapeError, "cos_sin_cache has no row", cos_sin_cache=zeros(0, 4))
    refused(ShapeError, "values of a head of q_pe lie 2 apart", q_pe=zeros(2, 3, 8)[:, :, ::2])
    refused(ShapeError, "heads of q_pe are .* both even", q_pe=zeros(2, 3, 5)[:, :, :4])
    refused(ShapeError, "heads of q_pe are .* both even", q_pe=zeros(2, 3, 6)[:, :, 1:5])
    refused(LaunchError, "out_ptr", out=zeros(2, 3, 14)[:, :, :12])
    odd = {"q_latent": zeros(2, 3, 5), "q_pe": zeros(2, 3, 4), "out": zeros(2, 3, 9)}
    refused(ShapeError, "an even kv_lora_rank, got 4 and 5", **odd)
    six = {"q_latent": zeros(2, 3, 6), "q_pe": zeros(2, 3, 6), "cos_sin_cache": zeros(5, 6)}
    refused(ShapeError, "a power of two as rope_dim .* got 6 and 6", **six)
