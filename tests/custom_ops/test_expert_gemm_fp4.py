"""The grouped GEMM of experts in MXFP4 by the kernel of custom_ops/, against sums in float64.

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
from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.dense_kernels import quantize_rows
from fd_dsa.ops.expert_gemm_fp4_cuda import HALF, Fp4ExpertGemm, kernel_for
from fd_dsa.ops.expert_pairs import group_pairs
from fd_dsa.ops.four_bit_gemm import four_bit_gemm
from fd_dsa.ops.fp8 import E4M3_VALUES, encode_e4m3
from fd_dsa.ops.split_sums import Tiling
from fd_dsa.tensor import FourBitWeight, Fp8Rows, Normed
from tests.custom_ops.expert_case import ExpertCase
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8
from tests.ops.four_bit_case import MXFP4, NVFP4, Weight
from tests.ops.test_expert_kernels import choices

KERNELS = "expert_gemm_fp4"


@pytest.fixture
def launches(hopper_memory: KernelMemory, count_calls: Any) -> list[int]:
    """Number of rows of each call of the kernel."""
    calls: list[int] = count_calls(Fp4ExpertGemm, lambda x, *rest: x.codes.shape[0])
    return calls


def fp8_values(x: np.ndarray) -> np.ndarray:
    """The values of rows that the kernel multiplies, float64."""
    groups = x.reshape(len(x), -1, 128).astype(np.float64)
    largest = np.maximum(np.abs(groups).max(axis=2, keepdims=True) / 448, 1e-12)
    scale = 2.0 ** np.ceil(np.log2(largest))
    codes = encode_e4m3((groups / scale).astype(np.float32))
    return (E4M3_VALUES[codes] * scale).reshape(x.shape)


class Case(ExpertCase):
    """Case in MXFP4, with rows that the kernel rounds to FP8."""

    def __init__(self, m: KernelMemory, *sizes: Any) -> None:
        super().__init__(m, MXFP4, *sizes)

    def by_kernel(
        self, limit: float | None = None, x: Fp8Rows | None = None, out: Fp8Rows | None = None
    ) -> np.ndarray:
        """The kernel's results in bfloat16. With `out` the kernel writes to it."""
        m, lists = self.m, group_pairs(self.m.put(self.ids), self.experts)
        rows = block_fp8.put(m, self.x, "bfloat16")
        kernel = kernel_for(rows)
        assert kernel is not None
        found = m.poisoned((self.ids.size, self.weight.codes.shape[2]), "bfloat16")
        x = quantize_rows(rows, True) if x is None else x
        kernel(x, self.weight.put(m), *lists, found if out is None else out, limit)
        return block_fp8.get(m, found)

    def check(
        self, found: np.ndarray, limit: float | None = None, x: np.ndarray | None = None
    ) -> None:
        """Assert the pairs with an expert against float64 of rows, the rounded ones without `x`."""
        flat = self.ids.ravel()
        used = np.unique(flat[flat >= 0])
        x = fp8_values(self.x) if x is None else x
        per_row = flat.size // len(self.x)
        for expert, values in zip(used, self.weight.values(used), strict=True):
            pairs = np.flatnonzero(flat == expert)
            sums = x[pairs // per_row] @ values.T
            size = np.abs(x[pairs // per_row]) @ np.abs(values).T
            # Tensor cores cut products 13 bits below the largest of 32. The sum of all 32 may lack
            # 2^-8 of that one.
            slack = 2.0**-10 * size if self.m.on_gpu else 2.0**-18 * size
            # scales below 2^-120 are 0
            wanted, bound = sums, slack + 2.0**-8 * np.abs(sums) + 2.0**-100
            if self.gated:
                (gate, up), (gate_slack, up_slack) = (np.split(a, 2, axis=1) for a in (sums, slack))
                if limit is not None:
                    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                silu = gate / (1 + np.exp(-gate))
                wanted = silu * up
                bound = 1.1 * gate_slack * np.abs(up) + np.abs(silu) * up_slack
                bound += 2.0**-8 * np.abs(wanted) + 1.1 * gate_slack * up_slack
            assert (np.abs(found[pairs] - wanted) <= bound).all()


# which, tokens, experts of a token, experts, columns, width; tiles of 16, 64 and 240 pairs, and for
# each of them several tiles of an expert; sizes of all thirds of a tile; experts without a token;
# one and two groups of columns; odd numbers of stages
CASES = [
    ("random", 1, 1, 3, 128, 128),
    ("one for all", 40, 1, 4, 128, 384),
    ("random", 80, 1, 4, 64, 256),
    ("one for all", 150, 1, 3, 128, 384),
    ("one for all", 130, 1, 2, 64, 256),
    ("one for all", 120, 1, 2, 128, 128),
    ("padded", 90, 3, 4, 192, 384),
    ("one for all", 200, 1, 2, 128, 128),
    ("one for all", 251, 1, 2, 128, 128),
]
LARGE = [
    ("random", 300, 6, 64, 256, 512),
    ("padded", 1500, 4, 5, 512, 2048),
    ("one for all", 2300, 1, 8, 256, 1024),
]


def cases(m: KernelMemory, number: int) -> list[tuple[str, int, int, int, int, int]]:
    return [CASES[number]] if number < len(CASES) else LARGE if m.large else []


@pytest.mark.parametrize("gated", [False, True], ids=["down", "gate_up"])
@pytest.mark.parametrize("number", range(len(CASES) + 1))
def test_every_pair_meets_its_expert(
    paddle_memory: KernelMemory, launches: list[int], number: int, gated: bool
) -> None:
    for which, num_tokens, top_k, experts, columns, width in cases(paddle_memory, number):
        ids = choices(which, num_tokens, top_k, experts)
        of_expert = columns if gated else -(-columns // 128) * 128
        case = Case(paddle_memory, ids, gated, of_expert, width, experts)
        found = case.by_kernel()
        assert launches == [len(case.x)]
        case.check(found)
        live = ids.ravel() >= 0
        np.testing.assert_array_equal(case.by_kernel()[live], found[live])
        launches.clear()


def test_small_tiles_beside_large_ones(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """A launch for many pairs has tiles of few."""
    for counts in ([300, 20, 50, 90], [290, 33, 64, 81]):
        ids = np.repeat(np.arange(4, dtype=np.int32), counts)[:, None]
        case = Case(paddle_memory, ids, False, 128, 256, 4)
        case.check(case.by_kernel())
    assert len(launches) == 2


def test_the_most_experts(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """The last expert has several tiles of columns, and so do both experts before it."""
    ids = np.int32([[1021], [1022], [1023]])
    case = Case(paddle_memory, ids, False, 384, 128, 1024)
    case.check(case.run())
    assert len(launches) == 1


def test_limit(paddle_memory: KernelMemory, launches: list[int]) -> None:
    case = Case(paddle_memory, choices("random", 9, 2, 3), True, 64, 128, 3)
    case.check(case.run(limit=0.05), 0.05)
    assert len(launches) == 1
    with pytest.raises(AssertionError):
        case.check(case.run(), 0.05)


@pytest.mark.parametrize("spread", [0, 11, 14, 26, 40])
def test_scales_far_apart(paddle_memory: KernelMemory, launches: list[int], spread: int) -> None:
    """Values of small scales are exact to 2^26 below the largest scale, and no larger then."""
    case = Case(paddle_memory, choices("one for all", 8, 1, 2), False, 128, 128, 2)
    scales = case.weight.scales
    # smaller ones are raised by the loader
    scales[..., 0::2], scales[..., 1::2] = 120, max(120 - spread, 120 - 26)
    # rows in which small scales are all that counts
    case.x[::2].reshape(-1, 4, 32)[:, 0::2] = 0
    if spread > 26:
        found = case.run()
        assert (np.abs(found[::2]) <= 6 * 2.0 ** (120 - 127 - 26) * np.abs(case.x).sum()).all()
    else:
        case.check(case.run())
    assert len(launches) == 1


def test_scales_at_the_ends(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """The smallest scales give 0, and the largest allowed ones stay finite."""
    case = Case(paddle_memory, choices("one for all", 8, 1, 2), False, 128, 128, 2)
    case.weight.scales[:, :, :64], case.weight.scales[:, :, 64:] = 0, 154
    found = case.run()
    assert (found[:, :64] == 0).all() and np.isfinite(found).all()
    case.check(found)


def test_rows_without_an_expert_are_not_written(
    paddle_memory: KernelMemory, launches: list[int]
) -> None:
    m, ids = paddle_memory, choices("padded", 70, 2, 3)
    case = Case(m, ids, True, 64, 128, 3)
    found = case.by_kernel()
    case.check(found)
    assert (bfloat16_bits(found).view(np.uint16)[ids.ravel() < 0] == 0xA5A5).all()
    few = Case(m, choices("padded", 30, 2, 8), True, 64, 128, 8)
    out = Fp8Rows(m.poisoned((60, 64), "uint8"), m.poisoned((1, 60), "float32"))
    few.by_kernel(out=out)
    without = few.ids.ravel() < 0
    assert (m.get(out.codes)[without] == 0xA5).all() and (m.get(out.codes)[~without] != 0xA5).any()
    assert (m.get(out.scales).view(np.uint32)[0, without] == 0xA5A5A5A5).all()


def test_special_values(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """A NaN stays in its row, and rows of zeros give zeros."""
    case = Case(paddle_memory, np.zeros((5, 1), np.int32), True, 64, 128, 1)
    case.x[1, 7], case.x[3] = np.nan, 0
    found = case.run()
    assert np.isnan(found[1]).all() and (found[3] == 0).all()
    assert np.isfinite(found[[0, 2, 4]]).all()
    m = paddle_memory
    rounded = Fp8Rows(m.poisoned((5, 64), "uint8"), m.poisoned((1, 8), "float32"))
    case.by_kernel(out=rounded)
    block_fp8.check_quantized(m, rounded, found, True, HALF)


def test_a_norm_gives_its_codes(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """Rows that a norm has quantised are not quantised again."""
    m = paddle_memory
    case = Case(m, choices("random", 9, 2, 3), True, 64, 128, 3)
    fp8 = quantize_rows(block_fp8.put(m, case.x, "bfloat16"), True)
    normed = Normed(m.poisoned(case.x.shape, "bfloat16"), fp8)
    lists = group_pairs(m.put(case.ids), 3)
    case.check(block_fp8.get(m, four_bit_gemm(normed, case.weight.put(m), *lists, top_k=2)))
    assert launches == [9]


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("gated", [False, True], ids=["down", "gate_up"])
def test_bits_of_a_row_in_any_batch(
    paddle_memory: KernelMemory, launches: list[int], gated: bool
) -> None:
    """Batch-invariant mode uses the kernel because of this."""
    ids = choices("random", 200, 2, 3)
    case = Case(paddle_memory, ids, gated, 128, 256, 3)
    whole, x = case.run(), case.x
    for tokens in (slice(0, 1), slice(199, 200), slice(7, 90), slice(0, 200, 3)):
        rows = np.arange(len(x)).reshape(200, -1)[tokens].ravel()
        case.ids, case.x = ids[tokens].copy(), x[rows]
        wanted = whole.reshape(200, 2, -1)[tokens].reshape(2 * len(case.ids), -1)
        np.testing.assert_array_equal(case.run(), wanted)
    assert len(launches) == 5


def test_other_forms_are_left_to_triton(paddle_memory: KernelMemory, launches: list[int]) -> None:
    m = paddle_memory
    nvfp4, odd = Weight(NVFP4, 2, 1, 128, 128).put(m), Weight(MXFP4, 2, 1, 64, 128).put(m)
    narrow, good = Weight(MXFP4, 2, 2, 64, 96).put(m), Weight(MXFP4, 2, 2, 64, 128).put(m)
    assert not any(Fp4ExpertGemm.supports(weight, 8) for weight in (nvfp4, odd, narrow))
    assert Fp4ExpertGemm.supports(good, 8) and not Fp4ExpertGemm.supports(good, 2**30)
    case = Case(m, choices("random", 9, 2, 3), True, 64, 128, 3)
    case.run(tiling=Tiling(16, 64, 4, 3))
    assert not launches


def test_what_the_launcher_refuses(paddle_memory: KernelMemory, launches: list[int]) -> None:
    m = paddle_memory
    good = Weight(MXFP4, 2, 1, 128, 128).put(m)
    rows = block_fp8.put(m, np.ones((4, 128)), "bfloat16")
    lists = group_pairs(m.put(np.zeros((4, 1), np.int32)), 2)
    kernel, x = kernel_for(rows), quantize_rows(rows, True)
    assert kernel is not None
    gated = Weight(MXFP4, 2, 2, 128, 128).put(m)
    many = group_pairs(m.put(np.zeros((32, 1), np.int32)), 2)

    def codes(num_rows: int, group: int) -> Fp8Rows:
        shape = (128 // group, num_rows)
        return Fp8Rows(m.poisoned((num_rows, 128), "uint8"), m.poisoned(shape, "float32"))

    def values(weight: FourBitWeight, num_rows: int = 4) -> Any:
        return m.poisoned((num_rows, weight.codes.shape[3]), "bfloat16")

    odd = Weight(MXFP4, 2, 1, 64, 128).put(m)
    more = Weight(MXFP4, 1025, 1, 128, 128).put(m) if m.on_gpu else good._replace(width=96)
    for wrong in (
        (x, odd, *lists, values(odd)),
        (x, more, *lists, values(more)),
        # scales of 64 values: too many pairs, other groups, a first GEMM, results of a second one
        (codes(32, HALF), good, *many, values(good, 32)),
        (codes(32, 128), gated, *many, codes(32, HALF)),
        (codes(4, 32), good, *lists, values(good)),
        (codes(4, HALF), gated, *lists, values(gated)),
        (x, good, *lists, codes(4, HALF)),
        # not a scale for each pair
        (x, gated, *lists, codes(4, HALF)._replace(scales=m.poisoned((2, 3), "float32"))),
    ):
        with pytest.raises(DeviceError, match="fd_dsa_expert_gemm_fp4_cuda: CUDA error"):
            kernel(*wrong, None)
    out = m.poisoned((513,), "bfloat16")[1:].reshape([4, 128])
    with pytest.raises(LaunchError, match="out is not aligned to 16 bytes"):
        kernel(x, good, *lists, out, None)
    for num_tokens, is_counted in ((127, False), (128, True)):
        pairs = group_pairs(m.put(np.zeros((num_tokens, 1), np.int32)), 2)
        many, out = codes(num_tokens, 128), values(good, num_tokens)
        kernel(many, good, *pairs, out, None)
        assert (kernel.job.taken is not None) == is_counted
        # a launch of more pairs is refused without the counter
        kernel.job.taken = None
        with pytest.raises(DeviceError) if is_counted else nullcontext():
            kernel.launch()


FORM, MULTIPLY = f"{KERNELS}_form.cuh", f"{KERNELS}_multiply.cuh"
FAULTS = {
    "signs of other codes": (FORM, "word << 4 & 0x80808080u", "word << 8 & 0x80808080u"),
    "the scale of another group": (MULTIPLY, "0x4440 + i)", "0x4440 + (i + 1) % 4)"),
    "a scale without its peak": (MULTIPLY, "- peaks[r] * kLowStep", "- 120 * kLowStep"),
    "codes of another column": (MULTIPLY, "kHalfColumns : 8;", "kHalfColumns : 7;"),
    "scales of another stage": (FORM, "+= kScaleParts * job.x_stride;", "+= kScaleParts;"),
    "no wait for a GEMM": (MULTIPLY, "finish<kCount, 1>", "finish<kCount, 2>"),
    "tiles leave out pairs": ("expert_tiles.cuh", "tile.first / kRows * rows", "tile.first"),
    "one limit for both sides": (
        *("expert_result.cuh", "up < -limit ? -limit", "up < -limit ? limit"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(assert_fault_shows: Callable[..., None], fault: str) -> None:
    assert_fault_shows(check_tiles_of_each_size, *FAULTS[fault])


def check_tiles_of_each_size(m: KernelMemory) -> None:
    """Assert results of tiles of 16, 64 and 240 pairs, with more stages than a block holds."""
    for which, num_tokens, gated in [
        ("one for all", 40, True),
        ("one for all", 40, False),
        ("random", 80, True),
        ("padded", 150, False),
    ]:
        case = Case(m, choices(which, num_tokens, 1, 4), gated, 128, 1408, 4)
        case.check(case.by_kernel(0.5 if gated else None), 0.5 if gated else None)
