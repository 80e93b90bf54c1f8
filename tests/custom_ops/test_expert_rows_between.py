"""Rows in FP8 between both GEMMs of experts in MXFP4, for few pairs an expert.

On a GPU, in Paddle's memory, and on the CPU with emulated threads; see test_sparse_mla_kernel.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.models.four_bit_check import difference
from fd_dsa.models.four_bits import FourBits
from fd_dsa.ops.expert_gemm_fp4_cuda import HALF
from fd_dsa.ops.expert_pairs import group_pairs
from fd_dsa.ops.four_bit_gemm import four_bit_gemm
from fd_dsa.tensor import Fp8Rows
from tests.custom_ops import test_expert_gemm_fp4
from tests.custom_ops.test_expert_gemm_fp4 import KERNELS, Case
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8
from tests.ops.test_expert_kernels import choices

# the fixture of those tests
launches = test_expert_gemm_fp4.launches
# tokens, experts of a token, experts, columns; several tiles of an expert, which end before 16
# pairs; one and several groups of columns
BETWEEN = [(1, 2, 3, 128), (37, 1, 4, 128), (50, 3, 12, 384)]


@pytest.mark.parametrize("number", range(len(BETWEEN)))
def test_rows_between_both_gemms(
    paddle_memory: KernelMemory, launches: list[int], number: int
) -> None:
    """With few pairs the first GEMM rounds its results, a scale for each 64 values."""
    (tokens, top_k, *_) = BETWEEN[number]
    check_both_gemms(paddle_memory, *BETWEEN[number])
    assert launches == [tokens, tokens, tokens * top_k]


def check_both_gemms(m: KernelMemory, tokens: int, top_k: int, experts: int, columns: int) -> None:
    """Assert the rows that the first GEMM writes, and the second GEMM of them."""
    ids = choices("random" if top_k > 1 else "one for all", tokens, top_k, experts)
    case = Case(m, ids, True, columns, 256, experts)
    # rows of several scales, and one of zeros
    case.x *= 4.0 ** (np.arange(tokens)[:, None] % 7 - 3)
    case.x[tokens // 2] *= 0 if tokens > 1 else 1
    lists, x = group_pairs(m.put(ids), experts), block_fp8.put(m, case.x, "bfloat16")
    found = four_bit_gemm(x, case.weight.put(m), *lists, top_k=top_k, limit=0.25)
    assert isinstance(found, Fp8Rows)
    block_fp8.check_quantized(m, found, case.by_kernel(0.25), True, HALF)
    down = Case(m, ids, False, 256, columns, experts)
    result = four_bit_gemm(found, down.weight.put(m), *lists, top_k=top_k)
    codes, scales = m.get(found.codes), m.get(found.scales)
    down.check(block_fp8.get(m, result), x=block_fp8.row_values(codes, scales, HALF))


@pytest.mark.parametrize(("tokens", "columns"), [(48, 128), (47, 192)])
def test_rows_between_both_gemms_in_bfloat16(
    paddle_memory: KernelMemory, launches: list[int], tokens: int, columns: int
) -> None:
    """Many pairs, or a width that the second GEMM leaves to Triton."""
    ids = choices("random", tokens, 1, 3)
    case = Case(paddle_memory, ids, True, columns, 128, 3)
    case.check(case.run())
    assert launches == [tokens]


def test_stages_of_rows_between(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """Odd and even numbers of stages, more than a block holds, and scales of padding."""
    m = paddle_memory
    for width in (128, 1280, 1408):
        case = Case(m, choices("padded", 40, 2, 8), False, 128, width, 8)
        rng = np.random.default_rng(width)
        codes = block_fp8.codes(rng, 80, width)
        scales = np.full((width // HALF, 80), np.nan, np.float32)
        scales[:, case.ids.ravel() >= 0] = 2.0 ** rng.integers(-6, 6, (width // HALF, 1))
        x = block_fp8.row_values(codes, scales, HALF)
        case.check(case.by_kernel(x=block_fp8.put_pair(m, (codes, scales))), x=x)
    assert len(launches) == 3


def test_the_check_at_the_start_runs_every_form(
    paddle_memory: KernelMemory, launches: list[int]
) -> None:
    """Rows in FP8 between both GEMMs, then tiles of 64 and of 240 pairs."""
    check_at_the_start(paddle_memory)
    assert launches == [pairs for pairs in (3, 21, 34, 85, 1155) for _ in range(2)]


MULTIPLY = f"{KERNELS}_multiply.cuh"
FAULTS = {
    "largest of half of the columns": ("own + F::kLinesBytes", "own"),
    "scale of another group": ("group * job.out_stride", "(group ^ 1) * job.out_stride"),
    "scales of one half": ("+ i * (kPairs * 4)", "+ 0 * (kPairs * 4)"),
    "a part of the other half": ("parts[i / kSteps], codes[i]", "parts[i % kScaleParts], codes[i]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(assert_fault_shows: Callable[..., None], fault: str) -> None:
    assert_fault_shows(check_rows_between, MULTIPLY, *FAULTS[fault])


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_at_the_start_finds_a_fault(
    assert_fault_shows: Callable[..., None], fault: str
) -> None:
    assert_fault_shows(check_at_the_start, MULTIPLY, *FAULTS[fault])


def check_at_the_start(m: KernelMemory) -> None:
    """Assert that the check of a start finds no difference."""
    assert difference(FourBits(frozenset(), "e8m0", 32), m.poisoned) == ""


def check_rows_between(m: KernelMemory) -> None:
    """Assert rows between both GEMMs of few pairs."""
    for number in range(1, len(BETWEEN)):
        check_both_gemms(m, *BETWEEN[number])
