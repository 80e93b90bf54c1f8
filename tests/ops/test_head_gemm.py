"""GEMMs of heads against NumPy: rows of the result that a list names, and rows that it leaves."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from tests.kernel_memory import POISON, KernelMemory
from tests.ops import block_fp8

HEADS, IN, OUT = 3, 40, 24
# more rows than a tile of any form has
MANY = 150


def operands(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x [rows, heads, in] and weight [heads, in, out] of small integers."""
    rng = np.random.default_rng(rows)
    x, weight = (rng.integers(-3, 4, shape) for shape in ((rows, HEADS, IN), (HEADS, IN, OUT)))
    return x.astype(np.float32), weight.astype(np.float32)


def test_rows_of_the_result_and_places_without_a_row(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.head_gemm import head_gemm

    m, (x, weight) = kernel_memory, operands(5)
    rows = np.array([6, -1, 0, 3, -1], np.int32)
    out = m.poisoned((8, HEADS, OUT), "float32")
    head_gemm(m.put(x), m.put(weight), out=out, rows=m.put(rows))
    found, product = m.get(out), np.einsum("nhi,hio->nho", x, weight)
    np.testing.assert_array_equal(found[[6, 0, 3]], product[[0, 2, 3]])
    untouched = np.setdiff1d(np.arange(8), rows)
    assert (np.ascontiguousarray(found[untouched]).view(np.uint8) == POISON).all()


@pytest.mark.parametrize("count", [0, 1, 64, 70, MANY, MANY + 9])
@pytest.mark.parametrize("in_first", [True, False])
def test_tokens_past_a_count_on_the_device_have_no_result(
    kernel_memory: KernelMemory, in_first: bool, count: int
) -> None:
    from fd_dsa.ops.head_gemm import head_gemm

    m, (x, weight) = kernel_memory, operands(MANY)
    product = np.einsum("nhi,hio->nho", x, weight)
    if not in_first:
        weight = np.ascontiguousarray(weight.transpose(0, 2, 1))
    # nothing that a live token reads
    x[count:] = np.nan
    out = m.poisoned((MANY, HEADS, OUT), "float32")
    tokens = m.put(np.array([count], np.int32))
    head_gemm(m.put(x), m.put(weight), out=out, in_first=in_first, count=tokens)
    found = m.get(out)
    np.testing.assert_array_equal(found[:count], product[:count])
    assert (np.ascontiguousarray(found[count:]).view(np.uint8) == POISON).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5, MANY])
@pytest.mark.parametrize("lists_rows", [True, False])
def test_absorbed_queries_are_those_of_two_launches(
    kernel_memory: KernelMemory, lists_rows: bool, tokens: int, dtype: str
) -> None:
    from fd_dsa.ops.head_gemm import absorb_queries, head_gemm
    from fd_dsa.ops.query_kernels import prepare_mla_query

    m, half, rng = kernel_memory, 8, np.random.default_rng(tokens)
    wide = block_fp8.put(m, rng.standard_normal((tokens, HEADS, IN + 2 * half)), dtype)
    keys = block_fp8.put(m, operands(tokens)[1], dtype)
    table = m.put(rng.standard_normal((tokens + 2, 2 * half), np.float32))
    # a device clamps numbers past the table
    rows = rng.permutation(tokens).astype(np.int32)
    rows[-1] = tokens + 9
    numbers = m.put(rows) if lists_rows else None
    wanted = m.poisoned((tokens, HEADS, OUT + 2 * half), dtype)
    latent = head_gemm(wide[:, :, :IN], keys)
    prepare_mla_query(latent, wide[:, :, IN:], numbers, table, wanted)
    found = m.poisoned((tokens, HEADS, OUT + 2 * half), dtype)
    absorb_queries(wide, keys, table, found, numbers)
    np.testing.assert_array_equal(m.get(found), m.get(wanted))
