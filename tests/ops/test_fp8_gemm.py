"""The FP8 GEMM against float64 of its own operands, for every tiling and in every memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from benchmarks import _tilings
from fd_dsa.device.transfers import Transfers
from fd_dsa.errors import ShapeError
from fd_dsa.ops import device_matrix, split_sums
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.dense_kernels import quantize_rows
from fd_dsa.ops.device_matrix import DeviceMatrix, GroupedFp8
from fd_dsa.ops.fp8_gemm import configuration, fp8_linear, fp8_linear_by_group
from fd_dsa.ops.split_sums import Tiling
from tests.kernel_memory import KernelMemory, ending_midway, open_memory
from tests.ops import block_fp8
from tests.ops.block_fp8 import put_pair, row_values, weight_values
from tests.ops.cublaslt_fakes import Bench, Driver, MultiplyingBlas, Tensor
from tests.triton_runtime.fakes import driven_by

pytestmark = pytest.mark.triton

# rows, columns, width: parts of blocks, of tiles and of vectors, and several of each
SMALL = ((1, 200, 320), (19, 130, 136), (150, 64, 200), (3, 384, 1300), (5, 200, 1792))
LARGE = (
    (1, 2240, 7168),
    (4, 512, 7168),
    (16, 7168, 256),
    (8, 7168, 16384),
    (77, 4096, 7168),
    (300, 576, 7168),
    (2048, 7168, 2048),
)


def dirty_scratch(m: KernelMemory) -> Any:
    """Scratch memory as an earlier launch may leave it: counters at zero, sums of any value."""
    values = np.full(split_sums.NUM_COUNTERS + split_sums.NUM_PARTIALS, np.nan, np.float32)
    values[: split_sums.NUM_COUNTERS] = 0
    return m.put(values)


class Case:
    """Operands of one GEMM in a memory, and its result in float64."""

    def __init__(self, m: KernelMemory, rows: int, columns: int, width: int) -> None:
        rng = np.random.default_rng([rows, columns, width])
        x, weight = block_fp8.activations(rng, rows, width), block_fp8.weight(rng, columns, width)
        self.m, self.x, self.weight = m, put_pair(m, x), put_pair(m, weight)[:2]
        values, every = row_values(*x), weight_values(*weight)
        self.wanted = values @ every.T
        # what the sum of a value is made of: its rounding grows with it
        self.size = np.abs(values) @ np.abs(every).T

    def check(self, out_dtype: str = "float32", **options: Any) -> np.ndarray:
        """Assert the result, and return it."""
        found = fp8_linear(self.x, *self.weight, out_dtype, **options)
        assert str(found.dtype).endswith(out_dtype)
        values = block_fp8.get(self.m, found)
        # Hopper's tensor cores cut products of codes off 13 bits below the largest of 32: of codes
        # of all sizes up to 2^-10.4 of the sums of magnitudes was seen, and cuBLASLt had the same
        step = 2.0**-10 if self.m.on_gpu else 2.0**-21
        bound = step * self.size
        if out_dtype == "bfloat16":
            bound = bound + 2.0**-8 * np.abs(self.wanted)
        assert (np.abs(values - self.wanted) <= bound).all()
        return values


def shapes(m: KernelMemory) -> tuple[tuple[int, int, int], ...]:
    """Sizes that this memory has the time for."""
    return SMALL + LARGE if m.large else SMALL


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_values(paddle_memory: KernelMemory, out_dtype: str) -> None:
    for shape in shapes(paddle_memory):
        Case(paddle_memory, *shape).check(out_dtype)


@pytest.mark.parametrize("round_scales", [None, False, True])
def test_values_by_group(paddle_memory: KernelMemory, round_scales: bool | None) -> None:
    """Each group of inputs has a weight of its own. Codes are those of the result in bfloat16."""
    m, rng = paddle_memory, np.random.default_rng(4)
    sizes = (1, 3, 128, 640), (19, 2, 256, 128), (65, 2, 128, 256), (5, 2, 128, 512)
    large = ((4, 2, 256, 4096), (13, 2, 1024, 4096)) if m.large else ((3, 2, 128, 2048),)
    for rows, groups, columns, width in (*sizes, *large):
        x = block_fp8.activations(rng, rows, groups * width)
        weight = block_fp8.weight(rng, groups * columns, width)
        values = row_values(*x).reshape(rows, groups, width)
        every = weight_values(*weight).reshape(groups, columns, width)
        wanted = np.einsum("rgk,gnk->rgn", values, every).reshape(rows, -1)
        size = np.einsum("rgk,gnk->rgn", np.abs(values), np.abs(every)).reshape(rows, -1)
        operands = put_pair(m, x), *put_pair(m, weight)[:2]
        found = fp8_linear_by_group(*operands, round_scales)
        if round_scales is not None:
            plain = block_fp8.get(m, fp8_linear_by_group(*operands))
            block_fp8.check_quantized(m, found, plain, round_scales)
            continue
        step = 2.0**-10 if m.on_gpu else 2.0**-21
        bound = step * size + 2.0**-8 * np.abs(wanted)
        assert (np.abs(block_fp8.get(m, found) - wanted) <= bound).all()


def test_long_steps_by_cublaslt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are those of our kernel, but for their roundings."""
    m, rng = open_memory("interpreter"), np.random.default_rng(6)
    groups, columns, width = 2, 128, 512
    weight = GroupedFp8(*put_pair(m, block_fp8.weight(rng, groups * columns, width))[:2], True)
    plain, fp8 = (
        DeviceMatrix(m.put(np.zeros((1, 1), np.uint8)), scales, round_scales=True)
        for scales in (None, m.put(np.ones((1, 1), np.float32)))
    )
    monkeypatch.setattr(device_matrix, "GROUPED_ROWS", 13)
    with driven_by(Driver()) as driver:
        bench = Bench(driver, blas=MultiplyingBlas)
        library = SimpleNamespace(fp8_linear=lambda *t: bench.lt.fp8_linear(*map(on_host, t)))
        monkeypatch.setattr(device_matrix, "library_on", lambda kind, place: (library, True))
        for rows, calls in ((12, 0), (13, 4), (16, 8)):
            x = block_fp8.put(m, rng.standard_normal((rows, groups, width)), "bfloat16")
            given = quantize_rows(x.reshape([rows, -1]), True)
            own = block_fp8.get(m, fp8_linear_by_group(given, weight.codes, weight.scales))
            found = block_fp8.get(m, weight.matmul_join_heads(x, plain))
            block_fp8.check_quantized(m, weight.matmul_join_heads(x, fp8), found, True)
            assert len(bench.blas.launches) == calls and found.shape == own.shape
            # a bit of a bfloat16, and float32 sums
            bound = 2.0**-7 * np.abs(own) + 2.0**-20 * np.abs(own).max()
            assert (np.abs(found - own) <= bound).all()


def on_host(tensor: Any) -> Tensor:
    """A tensor as the fake device has it, at its own address."""
    dtype = f"fake.{dtype_name(tensor.dtype)}"
    return Tensor(tensor.data_ptr(), tuple(tensor.shape), dtype)


def test_groups_that_do_not_fit_are_refused(paddle_memory: KernelMemory) -> None:
    x, codes, scales = _operands(paddle_memory, 2)
    with pytest.raises(ShapeError, match=r"by group: got \[130, 136\] and rows of 136 codes"):
        fp8_linear_by_group(x, codes, scales)


# tiles of part of a scale's columns, a part for each of 5 groups along K, two bands of row tiles
TILINGS = (
    ((19, 200, 520), Tiling(16, 32, 4, 3, 40)),
    ((19, 200, 520), Tiling(32, 128, 4, 3, 40)),
    ((129, 130, 264), Tiling(128, 64, 4, 3, 40)),
    ((136, 130, 136), Tiling(16, 128, 4, 3, 1)),
    ((5, 200, 1024), Tiling(8, 16, 4, 3, groups=4)),
    ((5, 200, 1024), Tiling(8, 16, 4, 3, 80, groups=2)),
    ((8, 200, 512), Tiling(8, 16, 4, 3, groups=4)),
)


def test_every_tiling_gives_the_same_values(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, scratch = paddle_memory, dirty_scratch(paddle_memory)
    monkeypatch.setattr("fd_dsa.ops.fp8_gemm.scratch_beside", lambda *_: scratch)
    large = ((LARGE[5], tiling) for tiling in _tilings.FP8_GEMMS)
    for shape, tiling in (*TILINGS, *large) if m.large else TILINGS:
        Case(m, *shape).check(tiling=tiling)
        assert not m.get(scratch[: split_sums.NUM_COUNTERS]).any()


def test_chosen_tilings_are_candidates() -> None:
    for rows in (1, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 8192):
        for columns, width in (
            (2112, 7168),
            (7168, 16384),
            (512, 7168),
            (24576, 1536),
            (7168, 256),
        ):
            assert configuration(rows, columns, width) in _tilings.fp8_gemms(rows)


def test_splits_have_work_and_room() -> None:
    for steps in (1, 5, 56, 144):
        for tiles in (1, 7, 33, 112, 2000):
            for size in (16 * 64, 128 * 128):
                most = min(split_sums.MAX_SPLITS, 396 // tiles)
                splits, each = split_sums.splits_of(steps, tiles, size, most)
                assert (splits - 1) * each < steps <= splits * each
                if splits > 1:
                    assert tiles * splits <= 396 and tiles <= split_sums.NUM_COUNTERS
                    assert tiles * splits * size <= split_sums.NUM_PARTIALS


def test_bits_are_the_same_in_every_run(paddle_memory: KernelMemory) -> None:
    m = paddle_memory
    case = Case(m, *(LARGE[0] if m.large else SMALL[3]))
    first = case.check()
    for _ in range(100 if m.large else 3):
        np.testing.assert_array_equal(case.check(), first)


def test_rows_that_are_not_finite_stay_alone(paddle_memory: KernelMemory) -> None:
    m, case = paddle_memory, Case(paddle_memory, 5, 64, 200)
    clean = case.check()
    codes = m.get(case.x.codes)
    codes[2, 190] = 0x7F
    found = block_fp8.get(m, fp8_linear(case.x._replace(codes=m.put(codes)), *case.weight))
    assert np.isnan(found[2]).all()
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(found[others], clean[others], rtol=2**-8)


def test_no_rows(paddle_memory: KernelMemory) -> None:
    assert list(fp8_linear(*_operands(paddle_memory, 0)).shape) == [0, 130]


def _operands(m: KernelMemory, rows: int) -> tuple[Any, Any, Any]:
    case = Case(m, rows, 130, 136)
    return case.x, *case.weight


def test_what_does_not_fit_is_refused(paddle_memory: KernelMemory) -> None:
    x, codes, scales = _operands(paddle_memory, 2)
    with pytest.raises(ShapeError, match=r"codes \[130, 136\] and scales \[1, 2\], allowed .*2, 2"):
        fp8_linear(x, codes, scales[:1])
    with pytest.raises(ShapeError, match="rows of 136 codes"):
        fp8_linear(x, codes[:, :128].contiguous(), scales)


def test_captured_before_the_first_run_it_does_not_split(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Transfers, "is_capturing", lambda self: True)
    monkeypatch.setattr(split_sums, "SCRATCH", {})
    Case(paddle_memory, 3, 384, 1300).check()
    assert "run a step before the capture" in caplog.text and not split_sums.SCRATCH


def test_a_launch_that_ends_midway_leaves_no_counts(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(paddle_memory, *SMALL[3])
    with ending_midway(paddle_memory, monkeypatch):
        case.check()
    case.check()
