"""The grouped GEMM of experts in NVFP4 or INT4 by the kernel of custom_ops/, against float64.

On a GPU, in Paddle's memory, and on the CPU with emulated threads; see test_sparse_mla_kernel.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.errors import DeviceError, LaunchError
from fd_dsa.models.four_bit_check import difference
from fd_dsa.models.four_bits import FourBits
from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.expert_gemm import configuration
from fd_dsa.ops.expert_gemm_w4a16_cuda import W4a16ExpertGemm, kernel_for, suits
from fd_dsa.ops.expert_pairs import group_pairs
from fd_dsa.ops.split_sums import Tiling
from tests.custom_ops.expert_case import ExpertCase
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8
from tests.ops.four_bit_case import INT4, MXFP4, NVFP4, Form, Weight
from tests.ops.test_expert_kernels import choices

KERNELS = "expert_gemm_w4a16"
FORMS = pytest.mark.parametrize("form", [NVFP4, INT4, Form("int4", 128)], ids=str)


@pytest.fixture
def launches(hopper_memory: KernelMemory, count_calls: Any) -> list[int]:
    """Number of rows of each call of the kernel."""
    calls: list[int] = count_calls(W4a16ExpertGemm, lambda x, *rest: x.shape[0])
    return calls


class Case(ExpertCase):
    """Case whose results come from the kernel alone."""

    def by_kernel(self, limit: float | None = None) -> np.ndarray:
        """The kernel's results in bfloat16. Rows that it does not write have bytes of 0xA5."""
        m, lists = self.m, group_pairs(self.m.put(self.ids), self.experts)
        rows = block_fp8.put(m, self.x, "bfloat16")
        kernel = kernel_for(rows)
        assert kernel is not None
        found = m.poisoned((self.ids.size, self.weight.codes.shape[2]), "bfloat16")
        kernel(rows, self.weight.put(m), *lists, found, limit)
        return block_fp8.get(m, found)


# which, tokens, experts of a token, experts, groups of columns, width; tiles of each size, several
# tiles of an expert, experts without a token, and odd numbers of stages
CASES = [
    ("random", 1, 1, 3, 1, 128),
    ("one for all", 40, 1, 4, 1, 384),
    ("random", 80, 1, 4, 1, 256),
    ("padded", 90, 3, 4, 2, 384),
    ("one for all", 130, 1, 2, 1, 128),
    ("one for all", 190, 1, 2, 1, 256),
]
LARGE = [
    ("random", 300, 6, 64, 2, 512),
    ("padded", 1500, 4, 5, 4, 2048),
    ("one for all", 2300, 1, 8, 2, 1024),
]


@pytest.mark.parametrize("gated", [False, True], ids=["down", "gate_up"])
@pytest.mark.parametrize("number", range(len(CASES) + 1))
@FORMS
def test_every_pair_meets_its_expert(
    paddle_memory: KernelMemory, launches: list[int], form: Form, number: int, gated: bool
) -> None:
    cases = [CASES[number]] if number < len(CASES) else LARGE if paddle_memory.large else []
    for which, num_tokens, top_k, experts, groups, width in cases:
        ids = choices(which, num_tokens, top_k, experts)
        columns = groups * (128 if gated else 256)
        case = Case(paddle_memory, form, ids, gated, columns, width, experts)
        found = case.by_kernel()
        assert launches == [len(case.x)]
        case.check(found)
        live = ids.ravel() >= 0
        np.testing.assert_array_equal(case.by_kernel()[live], found[live])
        launches.clear()


@FORMS
def test_tiles_of_each_size(paddle_memory: KernelMemory, launches: list[int], form: Form) -> None:
    ids = np.repeat(np.arange(9, dtype=np.int32), [10, 30, 45, 60, 75, 90, 110, 120, 140])[:, None]
    case = Case(paddle_memory, form, ids, False, 256, 256, 9)
    case.check(case.by_kernel())
    assert len(launches) == 1


def test_the_most_experts(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """The last expert has several tiles of columns, and so do both experts before it."""
    ids = np.int32([[1021], [1022], [1023]])
    case = Case(paddle_memory, NVFP4, ids, False, 512, 128, 1024)
    case.check(case.by_kernel())
    assert len(launches) == 1


@FORMS
def test_limit(paddle_memory: KernelMemory, launches: list[int], form: Form) -> None:
    case = Case(paddle_memory, form, choices("random", 9, 2, 3), True, 128, 128, 3)
    case.check(case.by_kernel(0.05), 0.05)
    assert len(launches) == 1
    with pytest.raises(AssertionError):
        case.check(case.by_kernel(), 0.05)


def test_scales_at_the_ends(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """The smallest scales of e4m3 and the largest ones are exact."""
    case = Case(paddle_memory, NVFP4, choices("one for all", 8, 1, 2), False, 256, 128, 2)
    case.weight.scales[..., 0::2], case.weight.scales[..., 1::2] = 1, 0x7E
    # rows in which small scales are all that counts
    case.x[::2].reshape(-1, 8, 16)[:, 1::2] = 0
    case.check(case.by_kernel())
    assert len(launches) == 1


def test_rows_without_an_expert_are_not_written(
    paddle_memory: KernelMemory, launches: list[int]
) -> None:
    ids = choices("padded", 70, 2, 3)
    case = Case(paddle_memory, NVFP4, ids, True, 128, 128, 3)
    found = case.by_kernel()
    case.check(found)
    assert (bfloat16_bits(found).view(np.uint16)[ids.ravel() < 0] == 0xA5A5).all()
    case.ids = np.full_like(ids, -1)
    assert (bfloat16_bits(case.by_kernel()).view(np.uint16) == 0xA5A5).all()


@FORMS
def test_special_values(paddle_memory: KernelMemory, launches: list[int], form: Form) -> None:
    """A NaN stays in its row, and rows of zeros give zeros."""
    case = Case(paddle_memory, form, np.zeros((5, 1), np.int32), True, 128, 128, 1)
    case.x[1, 7], case.x[3] = np.nan, 0
    found = case.by_kernel()
    assert np.isnan(found[1]).all() and (found[3] == 0).all()
    assert np.isfinite(found[[0, 2, 4]]).all()
    assert len(launches) == 1


@pytest.mark.parametrize("gated", [False, True], ids=["down", "gate_up"])
@FORMS
def test_bits_of_a_row_in_any_batch(
    paddle_memory: KernelMemory, launches: list[int], form: Form, gated: bool
) -> None:
    """Batch-invariant mode uses the kernel because of this."""
    ids = choices("random", 200, 2, 3)
    case = Case(paddle_memory, form, ids, gated, 256, 256, 3)
    whole, x = case.by_kernel(), case.x
    for tokens in (slice(0, 1), slice(199, 200), slice(7, 90), slice(0, 200, 3)):
        rows = np.arange(len(x)).reshape(200, -1)[tokens].ravel()
        case.ids, case.x = ids[tokens].copy(), x[rows]
        wanted = whole.reshape(200, 2, -1)[tokens].reshape(2 * len(case.ids), -1)
        np.testing.assert_array_equal(case.by_kernel(), wanted)
    assert len(launches) == 5


@FORMS
def test_bits_of_a_row_in_every_tile(
    paddle_memory: KernelMemory, launches: list[int], form: Form
) -> None:
    """The tensor cores multiply another number of pairs in each one."""
    case = Case(paddle_memory, form, np.zeros((128, 1), np.int32), False, 256, 384, 1)
    whole, ids, x = case.by_kernel(), case.ids, case.x
    for count in range(16, 128, 16):
        case.ids, case.x = ids[:count], x[:count]
        np.testing.assert_array_equal(case.by_kernel(), whole[:count])
    assert len(launches) == 8


def test_other_forms_are_left_to_triton(paddle_memory: KernelMemory, launches: list[int]) -> None:
    m = paddle_memory
    refused = [
        Weight(MXFP4, 2, 1, 256, 128),
        Weight(Form("int4", 64), 2, 1, 256, 128),
        Weight(NVFP4, 2, 1, 128, 128),
        Weight(NVFP4, 2, 2, 64, 128),
        Weight(NVFP4, 2, 2, 128, 96),
    ]
    assert not any(suits(weight.put(m), 80, 80) for weight in refused)
    good = Weight(NVFP4, 2, 2, 128, 128).put(m)
    assert suits(good, 80, 80) and not suits(good, 2**29, 2**29)
    case = Case(m, NVFP4, choices("random", 40, 2, 3), True, 128, 128, 3)
    case.check(case.run(tiling=Tiling(16, 64, 4, 3)))
    assert not launches
    case.check(case.run())
    assert launches == [40]


@pytest.mark.parametrize(("form", "most", "rows"), [(NVFP4, 72, 32), (INT4, 36, 16)], ids=str)
def test_few_pairs_are_left_to_triton(
    paddle_memory: KernelMemory, launches: list[int], form: Form, most: int, rows: int
) -> None:
    """Triton has tiles of up to 32 rows, 16 of integers. No step needs larger ones."""
    case = Case(paddle_memory, form, choices("random", 9, 2, 3), True, 128, 128, 3)
    case.check(case.run())
    assert not launches
    weight = case.weight.put(paddle_memory)
    for num_pairs, is_few in ((most, True), (most + 1, False)):
        tiling = configuration(form.kind, num_pairs, 3, True, 128, 128, 227 << 10)
        assert (tiling.rows == rows) == is_few
        assert suits(weight, num_pairs, num_pairs) == (not is_few)


@pytest.mark.usefixtures("one_order")
def test_batch_invariant_mode_has_one_kernel(
    paddle_memory: KernelMemory, launches: list[int]
) -> None:
    case = Case(paddle_memory, NVFP4, choices("random", 9, 2, 3), True, 128, 128, 3)
    case.check(case.run())
    assert launches == [9]


@pytest.mark.parametrize(("kind", "group"), [("e4m3", 16), ("int4", 128)])
def test_the_check_at_the_start_runs_every_tile(
    paddle_memory: KernelMemory, launches: list[int], kind: str, group: int
) -> None:
    assert difference(FourBits(frozenset(), kind, group), paddle_memory.poisoned) == ""
    # integers of two experts, tiles of up to 16, 32 and 48 pairs, then of up to 64 to 128
    few = [34, 34] if kind == "int4" else []
    assert launches == [*few, 85, 85, 1155, 1155]


def test_what_the_launcher_refuses(paddle_memory: KernelMemory, launches: list[int]) -> None:
    m = paddle_memory
    good = Weight(NVFP4, 2, 1, 256, 128).put(m)
    rows = block_fp8.put(m, np.ones((4, 128)), "bfloat16")
    lists = group_pairs(m.put(np.zeros((4, 1), np.int32)), 2)
    kernel = kernel_for(rows)
    assert kernel is not None
    odd, gated = Weight(NVFP4, 2, 1, 128, 128).put(m), Weight(NVFP4, 2, 2, 64, 128).put(m)
    more = Weight(NVFP4, 1025, 1, 256, 128).put(m) if m.on_gpu else good._replace(width=96)
    for wrong in (odd, gated, more, good._replace(factors=None)):
        out = m.poisoned((4, wrong.codes.shape[3]), "bfloat16")
        with pytest.raises(DeviceError, match="fd_dsa_expert_gemm_w4a16_cuda: CUDA error"):
            kernel(rows, wrong, *lists, out, None)
    with pytest.raises(DeviceError):
        # no whole number of pairs for each row
        kernel(rows, good, *lists, m.poisoned((6, 256), "bfloat16"), None)
    out = m.poisoned((1025,), "bfloat16")[1:].reshape([4, 256])
    with pytest.raises(LaunchError, match="out is not aligned to 16 bytes"):
        kernel(rows, good, *lists, out, None)
    for num_tokens, is_counted in ((127, False), (128, True)):
        pairs = group_pairs(m.put(np.zeros((num_tokens, 1), np.int32)), 2)
        many = block_fp8.put(m, np.ones((num_tokens, 128)), "bfloat16")
        out = m.poisoned((num_tokens, 256), "bfloat16")
        kernel(many, good, *pairs, out, None)
        assert (kernel.job.taken is not None) == is_counted
        # a launch of more pairs is refused without the counter
        kernel.job.taken = None
        with pytest.raises(DeviceError) if is_counted else nullcontext():
            kernel.launch()


SOURCE = f"{KERNELS}_multiply.cuh"
FAULTS = {
    "codes of another word": (SOURCE, "i < 4 ? words.x : words.y", "i < 4 ? words.x : words.x"),
    "a bit of code 0": (SOURCE, "words.y >> 6 & ~kFirst", "words.y >> 5 & ~kFirst"),
    "the scale of another group": (SOURCE, "step % 4 < 2 ?", "step % 8 < 2 ?"),
    "codes of another column": (SOURCE, "kHalfColumns : 8;", "kHalfColumns : 7;"),
    "columns of another block": (SOURCE, "block * Lines::kRowColumns) * 2)", "block) * 2)"),
    "values of another half": (SOURCE, "step / 4 * kOperand", "step % 2 * kOperand"),
    "no wait for a GEMM": (SOURCE, "wgmma_wait<1>();\n      pin(first);", "pin(first);"),
    "tiles leave out pairs": ("expert_tiles.cuh", "tile.first / kRows * rows", "tile.first"),
    "one limit for both sides": (
        *("expert_result.cuh", "up < -limit ? -limit", "up < -limit ? limit"),
    ),
    "no zero point": (SOURCE, "(load_scale(block, r) & 15) | 0x4300", "8 | 0x4300"),
    "the scale of another column": (SOURCE, "scales[i / 2 % 2]", "scales[i % 2]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(assert_fault_shows: Callable[..., None], fault: str) -> None:
    assert_fault_shows(check_tiles_of_each_size, *FAULTS[fault])


def check_tiles_of_each_size(m: KernelMemory) -> None:
    """Assert results of tiles of each size, with more stages than a block holds."""
    for form in NVFP4, INT4:
        for which, num_tokens, gated in [("padded", 40, True), ("one for all", 140, False)]:
            ids, columns = choices(which, num_tokens, 1, 4), 128 if gated else 256
            case = Case(m, form, ids, gated, columns, 896, 4)
            limit = 0.5 if gated else None
            case.check(case.by_kernel(limit), limit)
