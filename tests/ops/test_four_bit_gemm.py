"""Grouped GEMM of experts in four bits against float64 of the dequantised weights."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from benchmarks import _tilings
from fd_dsa.errors import LaunchError, ShapeError
from fd_dsa.ops import expert_gemm, four_bit_sums
from fd_dsa.ops.dense_kernels import quantize_rows
from fd_dsa.ops.expert_gemm import configuration
from fd_dsa.ops.expert_pairs import group_pairs
from fd_dsa.ops.four_bit_gemm import four_bit_gemm
from fd_dsa.ops.split_sums import Tiling
from fd_dsa.tensor import FourBitWeight
from fd_dsa.triton_runtime import INTERPRETING
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8
from tests.ops.four_bit_case import FORMS, INT4, MXFP4, NVFP4, Form, Weight
from tests.ops.test_expert_kernels import EXPERTS, choices

pytestmark = pytest.mark.triton


class Case:
    """Rows, experts of each token and a weight."""

    def __init__(
        self,
        m: KernelMemory,
        form: Form,
        ids: np.ndarray,
        *,
        gated: bool,
        columns: int = 40,
        width: int = 256,
        row_pairs: bool = False,
        experts: int = EXPERTS,
    ) -> None:
        self.m, self.ids, self.gated, self.experts = m, ids, gated, experts
        self.weight = Weight(form, experts, 1 + gated, columns, width)
        rows = ids.size if row_pairs else len(ids)
        rng = np.random.default_rng(rows)
        self.x = block_fp8.rounded(rng.standard_normal((rows, width)), "bfloat16")

    def run(
        self,
        weight: FourBitWeight | None = None,
        tiling: Tiling | None = None,
        limit: float | None = None,
    ) -> np.ndarray:
        """Results of all pairs."""
        weight = self.weight.put(self.m) if weight is None else weight
        lists = group_pairs(self.m.put(self.ids), self.experts)
        x, top_k = block_fp8.put(self.m, self.x, "bfloat16"), self.ids.shape[1]
        out = four_bit_gemm(x, weight, *lists, top_k=top_k, tiling=tiling, limit=limit)
        return block_fp8.get(self.m, out)

    def wanted(self, limit: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """float64 results of the pairs with an expert, and the error that they may have."""
        flat = self.ids.ravel()
        live = np.flatnonzero(flat >= 0)
        used, places = np.unique(flat[live], return_inverse=True)
        values = self.weight.values(used)
        x = self.x[live // (flat.size // max(len(self.x), 1))].astype(np.float64)
        sums = np.stack([values[at] @ row for at, row in zip(places, x, strict=True)])
        values = np.abs(values)
        sizes = [values[at] @ np.abs(row) for at, row in zip(places, x, strict=True)]
        size = np.stack(sizes)
        if not self.gated:
            return sums, 2.0**-18 * size + 2.0**-8 * np.abs(sums)
        (gate, up), (gate_size, up_size) = (np.split(one, 2, axis=1) for one in (sums, size))
        if limit is not None:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        silu = gate / (1 + np.exp(-gate))
        slack = 1.1 * gate_size * np.abs(up) + np.abs(silu) * up_size
        return silu * up, 2.0**-18 * slack + 2.0**-8 * np.abs(silu * up)

    def check(self, found: np.ndarray, limit: float | None = None) -> None:
        """Assert the pairs that have an expert."""
        wanted, bound = self.wanted(limit)
        live = self.ids.ravel() >= 0
        assert (np.abs(found[live] - wanted) <= bound).all()


# 140 pairs of an expert are more than a tile of any size
ROWS = [("random", 1, 3), ("random", 17, 2), ("padded", 40, 2), ("one for all", 300, 1)]


@pytest.mark.parametrize("gated", [False, True], ids=["down", "gate_up"])
@pytest.mark.parametrize(
    ("form", "which", "num_tokens", "top_k"),
    [(form, *rows) for form in FORMS for rows in (ROWS if form in FORMS[:3] else ROWS[1:3])],
    ids=str,
)
def test_values(
    paddle_memory: KernelMemory, form: Form, which: str, num_tokens: int, top_k: int, gated: bool
) -> None:
    ids = choices(which, num_tokens, top_k)
    case = Case(paddle_memory, form, ids, gated=gated, row_pairs=not gated)
    case.check(case.run())


def test_no_tokens(paddle_memory: KernelMemory) -> None:
    case = Case(paddle_memory, NVFP4, np.empty((0, 2), np.int32), gated=True)
    assert case.run().shape == (0, 40)


# no whole turn of 128 values, and a last tile of columns that is not full
@pytest.mark.parametrize("form", [NVFP4, MXFP4, Form("int4", 32)], ids=str)
@pytest.mark.parametrize(("columns", "width"), [(40, 96), (200, 160), (16, 32)])
def test_sizes_that_fill_no_tile(
    paddle_memory: KernelMemory, form: Form, columns: int, width: int
) -> None:
    ids = choices("random", 9, 2)
    case = Case(paddle_memory, form, ids, gated=True, columns=columns, width=width)
    case.check(case.run())


def test_limit(paddle_memory: KernelMemory) -> None:
    case = Case(paddle_memory, MXFP4, choices("random", 9, 2), gated=True)
    wanted = case.wanted(0.05)[0]
    assert not np.allclose(wanted, case.wanted()[0])
    case.check(case.run(limit=0.05), 0.05)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", [NVFP4, INT4], ids=str)
def test_every_tiling_gives_the_same_values(
    paddle_memory: KernelMemory, form: Form, gated: bool
) -> None:
    m, ids = paddle_memory, choices("random", 70, 2, 3)
    case = Case(m, form, ids, gated=gated, columns=130, width=256)
    few = Tiling(16, 128, 8, 3), Tiling(64, 64, 4, 3), Tiling(128, 64, 8, 3, maxnreg=128)
    for tiling in _tilings.experts("four bits", gated) if m.large else few:
        case.check(case.run(tiling=tiling))
    # the second program repeats the last tile
    one = case.run(tiling=Tiling(16, 64, 4, 4))
    several = case.run(tiling=Tiling(16, 64, 4, 4, column_tiles=2))
    np.testing.assert_array_equal(several[ids.ravel() >= 0], one[ids.ravel() >= 0])


def test_chosen_tilings_are_candidates() -> None:
    for tokens in (1, 2, 128, 512, 1024, 2048, 8192):
        for gated in (False, True):
            for shared_bytes in (227 << 10, 163 << 10, 99 << 10):
                for columns in (256, 512, 7168):
                    sizes = 8 * tokens, 256, gated, columns, 7168, shared_bytes
                    for kind in ("e4m3", "e8m0", "int4"):
                        chosen = configuration(kind, *sizes)
                        assert chosen in _tilings.experts("four bits", gated)


def test_bits_are_the_same_every_time(paddle_memory: KernelMemory) -> None:
    """An expert's rows do not depend on rows of others, either."""
    m, ids = paddle_memory, choices("one for all", 20, 2)
    case = Case(m, NVFP4, ids, gated=True)
    first, again = case.run(), case.run()
    np.testing.assert_array_equal(first, again)
    case.ids = ids.copy()
    case.ids[::2] = -1
    np.testing.assert_array_equal(case.run().reshape(20, -1)[1::2], first.reshape(20, -1)[1::2])


def test_experts_without_tokens_are_never_read(paddle_memory: KernelMemory) -> None:
    case = Case(paddle_memory, NVFP4, np.int32([[1, 4], [-1, -1], [1, 4]]), gated=True)
    case.weight.factors[[0, 2, 3, 5]] = np.nan
    case.check(case.run())


def test_rows_of_another_width_are_refused(paddle_memory: KernelMemory) -> None:
    case = Case(paddle_memory, INT4, choices("random", 2, 2), gated=False)
    case.x = case.x[:, :128].copy()
    with pytest.raises(ShapeError, match="rows: got 128 values, allowed: 256, as the weight has"):
        case.run()


def test_rows_in_fp8_without_the_kernel_for_them_are_refused(paddle_memory: KernelMemory) -> None:
    m, case = paddle_memory, Case(paddle_memory, NVFP4, choices("random", 2, 2), gated=False)
    x = quantize_rows(block_fp8.put(m, case.x, "bfloat16"), True)
    lists = group_pairs(m.put(case.ids), EXPERTS)
    with pytest.raises(LaunchError, match="only the kernel for MXFP4 reads rows in FP8"):
        four_bit_gemm(x, case.weight.put(m), *lists, top_k=2)


def swapped_codes(weight: Weight) -> None:
    """The first value of a byte in the high bits."""
    weight.codes = weight.codes.reshape(*weight.codes.shape[:3], -1, 2)[..., ::-1].reshape(
        weight.codes.shape
    )


def late_scales(weight: Weight) -> None:
    """Each group with the scale of the next one."""
    weight.scales = np.roll(weight.scales, 1, axis=3)


def late_zeros(weight: Weight) -> None:
    """Each group with the zero point of the next one."""
    weight.zeros = np.roll(weight.zeros, 1, axis=3)


def one_scale(weight: Weight) -> None:
    """Change the scale of one group of each column of one expert."""
    weight.scales[4, -1, :, 1] = weight.scales[4, -1, :, 0]


def other_factor(weight: Weight) -> None:
    """Up with the factor of gate."""
    weight.factors[:, 1] = weight.factors[:, 0]


def other_sign(weight: Weight) -> None:
    """Change the sign of one value of each column."""
    weight.codes[4, -1, :, 33] ^= 8


def other_part(weight: Weight) -> None:
    """Gate and up the other way round."""
    weight.codes = weight.codes[:, ::-1].copy()


FAULTS: list[tuple[Form, Callable[[Weight], None]]] = [
    *((form, fault) for form in (NVFP4, MXFP4, INT4) for fault in (swapped_codes, late_scales)),
    *((form, other_sign) for form in (NVFP4, MXFP4, INT4)),
    *((INT4, late_zeros), (NVFP4, one_scale), (NVFP4, other_factor), (INT4, other_part)),
]


@pytest.mark.parametrize(("form", "fault"), FAULTS)
def test_a_fault_shows(
    paddle_memory: KernelMemory, form: Form, fault: Callable[[Weight], None]
) -> None:
    """A weight that is laid out in another way gives values outside of the bounds."""
    case = Case(paddle_memory, form, choices("one for all", 9, 2), gated=True)
    other = Weight(form, EXPERTS, 2, 40, 256)
    fault(other)
    with pytest.raises(AssertionError):
        case.check(case.run(other.put(paddle_memory)))


WRONG_KERNELS = {
    "scales of the group before": (NVFP4, "_product(p[1], b)", "_product(p[1], a)"),
    "scales in another order": (NVFP4, "_bfloat16(even), _bfloat16(odd)", "_bfloat16(odd), odd"),
    "one scale for a piece": (MXFP4, "[None, :] % 4", "[None, :] // 8"),
    "half as large": (NVFP4, "0x70007000", "0x6F806F80"),
    "a sign is lost": (NVFP4, "(high << 2) & 0x9000", "(high << 2) & 0x1000"),
    "exponents of another code": (NVFP4, "(high >> 6) & 0x0120", "(high >> 3) & 0x0120"),
    "neighbours the other way round": (NVFP4, "low & 0xFFFF, low >> 16", "low >> 16, low & 0xFFFF"),
    "the sign of another half": (MXFP4, "7 - 4 * (NIBBLE // 4)", "3 + 4 * (NIBBLE // 4)"),
    "twice as large": (MXFP4, "+ 100) << 7", "+ 101) << 7"),
    "rows in order": (MXFP4, "rows = _in_order_of_words(rows)", "rows = rows"),
    "groups in another order": (MXFP4, "(0, 2, 4, 3, 1)", "(0, 2, 4, 1, 3)"),
    "one group for all": (INT4, "group * COLUMNS", "group * 0"),
    "no stored zero points": (INT4, "scale & 15 | 0x4300", "scale & 0 | 0x4308"),
    "low values twice": (INT4, "(4 * code)", "(4 * (code // 2))"),
    "values in another order": (INT4, "tl.join(left, right)", "tl.join(right, left)"),
    "up has the weight of gate": (INT4, "interleave(part, part + 1)", "interleave(part, part)"),
    "up has the factor of gate": (NVFP4, "tl.load(factor + 1)", "tl.load(factor)"),
    "the last values are left out": (INT4, "tl.range(0, pieces,", "tl.range(0, pieces - 1,"),
}


@pytest.mark.parametrize("fault", WRONG_KERNELS)
def test_a_wrong_kernel_shows(
    paddle_memory: KernelMemory, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not INTERPRETING:
        pytest.skip("compiled kernels keep the functions that they were compiled with")
    form, before, after = WRONG_KERNELS[fault]
    source = inspect.getsource(four_bit_sums)
    assert before in source
    (tmp_path / "wrong_sums.py").write_text(source.replace(before, after))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wrong_sums", raising=False)
    wrong = importlib.import_module("wrong_sums")
    monkeypatch.setattr(expert_gemm, "four_bit_sums", wrong.four_bit_sums)
    case = Case(paddle_memory, form, choices("one for all", 9, 2), gated=True)
    with pytest.raises(AssertionError):
        case.check(case.run())
