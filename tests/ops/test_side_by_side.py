"""Two GEMMs in one launch: the FP8 one to the bit as alone, the other one against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.device.transfers import Transfers
from fd_dsa.errors import ShapeError
from fd_dsa.ops import device_matrix, split_sums
from fd_dsa.ops.dense_kernels import GROUP, silu_and_mul
from fd_dsa.ops.device_matrix import DeviceMatrix
from fd_dsa.ops.fp8_gemm import fp8_linear
from fd_dsa.ops.side_by_side import MAX_GATED_ROWS, MAX_ROWS, division, side_by_side
from fd_dsa.ops.split_sums import Tiling
from fd_dsa.tensor import Fp8Rows, Normed
from tests.kernel_memory import KernelMemory, ending_midway
from tests.ops import block_fp8
from tests.ops.block_fp8 import put_pair, row_values, weight_values

pytestmark = pytest.mark.triton

# rows, columns of the FP8 weight and of the other one, width: parts of tiles and of steps
SMALL = ((1, 200, 70, 320), (2, 64, 3, 136), (17, 130, 64, 200), (32, 40, 129, 1300))
# wq_a and wkv of V4-Flash beside the bfloat16 weights of CSA and HCA layers
LARGE = ((1, 1536, 2624, 4096), (8, 1536, 1024, 4096), (32, 1536, 2624, 4096))
# with as many columns of the gate as of `up`, beside those of a router
GATED = ((1, 256, 70, 320), (3, 128, 16, 136), (8, 256, 129, 1300))
# the shared experts of V4-Flash and of V3.2
LARGE_GATED = ((1, 2048, 256, 4096), (8, 2048, 256, 7168))
FORMS = [(False, None), (True, None), (True, 0.5)]


class Case:
    """Operands of both GEMMs in a memory.

    The values of the rows differ in both forms, so that each weight must read its own.
    """

    def __init__(self, m: KernelMemory, rows: int, columns: int, others: int, width: int) -> None:
        rng = np.random.default_rng([rows, columns, others, width])
        x, weight = block_fp8.activations(rng, rows, width), block_fp8.weight(rng, columns, width)
        self.m, self.rows, self.shape = m, rows, (columns, others, width)
        self.plain, self.router = (
            block_fp8.rounded(rng.standard_normal(shape), "bfloat16")
            for shape in ((rows, width), (others, width))
        )
        self.x = Normed(block_fp8.put(m, self.plain, "bfloat16"), put_pair(m, x))
        self.weight = put_pair(m, weight)[:2]
        self.other = block_fp8.put(m, self.router, "bfloat16")
        values, every = row_values(*x), weight_values(*weight)
        self.wanted, self.size = values @ every.T, np.abs(values) @ np.abs(every).T

    def run(self, *how: Any) -> Any:
        """Launch, assert the result of the bfloat16 weight, and return that of the FP8 weight."""
        found, others = side_by_side(self.x, self.weight, self.other, *how)
        self.check_others(others)
        return found

    def check_others(self, found: Any) -> None:
        assert str(found.dtype).endswith("float32")
        wide, every = self.plain.astype(np.float64), self.router.astype(np.float64)
        bound = 2.0**-20 * (np.abs(wide) @ np.abs(every).T)
        assert (np.abs(block_fp8.get(self.m, found) - wide @ every.T) <= bound).all()

    def check_values(self, found: Any) -> None:
        step = 2.0**-10 if self.m.on_gpu else 2.0**-21
        bound = step * self.size + 2.0**-8 * np.abs(self.wanted)
        assert (np.abs(block_fp8.get(self.m, found) - self.wanted) <= bound).all()

    def alone(self, gated: bool = False) -> Any:
        """The FP8 GEMM in a launch of its own, with the same parts of sums."""
        columns, others, width = self.shape
        sizes = columns // (1 + gated), others, width, gated
        tile, splits = 128 if gated else 64, division(self.rows, *sizes).constants["SPLITS"]
        programs = -(-columns // tile) * splits
        tiling = Tiling(16 if self.rows <= 16 else 32, tile, 4, 3, programs)
        return fp8_linear(self.x.fp8, *self.weight, tiling=tiling)

    def check_codes(self, found: Fp8Rows, wanted: Any) -> None:
        """Codes and scales are the same to the bit, apart from the padding."""
        get = self.m.get
        np.testing.assert_array_equal(get(found.codes), get(wanted.codes))
        ours, theirs = get(found.scales), get(wanted.scales)
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours[:, : self.rows], theirs[:, : self.rows])


def cases(m: KernelMemory) -> list[Case]:
    """Cases that this memory has the time for."""
    return [Case(m, *shape) for shape in (SMALL + LARGE if m.large else SMALL)]


def gated_cases(m: KernelMemory) -> list[Case]:
    shapes = GATED + LARGE_GATED if m.large else GATED
    return [Case(m, rows, 2 * columns, *others) for rows, columns, *others in shapes]


def test_values(paddle_memory: KernelMemory) -> None:
    for case in cases(paddle_memory):
        found = case.run()
        assert str(found.dtype).endswith("bfloat16")
        case.check_values(found)
        alone = block_fp8.get(case.m, case.alone())
        np.testing.assert_array_equal(block_fp8.get(case.m, found), alone)


@pytest.mark.parametrize(("round_scales", "limit"), FORMS)
def test_codes_of_the_activation(
    paddle_memory: KernelMemory, round_scales: bool, limit: float | None
) -> None:
    for case in gated_cases(paddle_memory):
        wanted = silu_and_mul(case.alone(gated=True), round_scales, limit)
        case.check_codes(case.run(round_scales, limit), wanted)


QUICK_ROWS = {1, 2, 5, MAX_ROWS, MAX_ROWS + 1}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(rows, marks=[pytest.mark.slow] * (rows not in QUICK_ROWS))
        for rows in range(1, MAX_ROWS + 2)
    ],
)
def test_every_number_of_rows(paddle_memory: KernelMemory, rows: int) -> None:
    """Weights of a model call it, with one row more than one launch has too."""
    case = Case(paddle_memory, rows, 256, 24, 264)
    gate_up = DeviceMatrix(*case.weight, round_scales=True)
    router, down = DeviceMatrix(case.other, sums_in_float32=True), gate_up
    found, others = gate_up.matmul_beside(case.x, router)
    case.check_values(found)
    case.check_others(others)
    codes, others = gate_up.matmul_beside(case.x, router, down, 0.5)
    case.check_others(others)
    case.check_codes(codes, silu_and_mul(found, True, 0.5))


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail in a launch of both GEMMs."""

    def refuse(*given: Any) -> Any:
        raise AssertionError("one launch for both GEMMs")

    monkeypatch.setattr(device_matrix, "side_by_side", refuse)


@pytest.mark.usefixtures("no_launch")
def test_other_weights_have_launches_of_their_own(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(paddle_memory, 3, 256, 24, 264)
    weight = DeviceMatrix(*case.weight)
    plain = DeviceMatrix(case.other, sums_in_float32=True)
    for x, first, other in (
        (case.x.plain, plain, plain),
        (case.x, weight, weight),
        (case.x.plain, weight, plain),
    ):
        found, others = first.matmul_beside(x, other)
        for ours, alone in (found, first.matmul(x)), (others, other.matmul(x)):
            np.testing.assert_array_equal(block_fp8.get(case.m, ours), block_fp8.get(case.m, alone))
    monkeypatch.setattr(device_matrix, "fixed_order", lambda: True)
    found, others = weight.matmul_beside(case.x, plain)
    case.check_values(found)
    case.check_others(others)


def test_a_reader_without_fp8_gets_values(paddle_memory: KernelMemory) -> None:
    case = Case(paddle_memory, 3, 256, 24, 264)
    down = DeviceMatrix(block_fp8.put(case.m, np.zeros((4, 128), np.float32), "bfloat16"))
    router = DeviceMatrix(case.other, sums_in_float32=True)
    found, others = DeviceMatrix(*case.weight).matmul_beside(case.x, router, down)
    case.check_others(others)
    wanted = silu_and_mul(side_by_side(case.x, case.weight, case.other)[0])
    np.testing.assert_array_equal(block_fp8.get(case.m, found), block_fp8.get(case.m, wanted))


def test_columns_of_both_halves_in_a_group_are_activated_apart(
    paddle_memory: KernelMemory,
) -> None:
    case = Case(paddle_memory, 2, 200, 24, 264)
    weight, router = DeviceMatrix(*case.weight), DeviceMatrix(case.other, sums_in_float32=True)
    found, _ = weight.matmul_beside(case.x, router, weight)
    case.check_codes(found, silu_and_mul(weight.matmul_beside(case.x, router)[0], False))


def test_divisions_have_work_and_room() -> None:
    shapes = [shape[1:] for shape in (*SMALL, *LARGE, *GATED, *LARGE_GATED)]
    shapes += [(16384, 64, 16384), (64, 16384, 16384), (128, 64, 128), (2048, 384, 7168)]
    for columns, others, width in shapes:
        for rows, gated in ((1, True), (1, False), (17, False)):
            if gated and columns % GROUP:
                continue
            made = division(rows, columns, others, width, gated)
            given, whole = made.constants, division(rows, columns, others, width, gated, False)
            block, tile = given["BLOCK_ROWS"], given["BLOCK_COLUMNS"] * (1 + gated)
            tiles = -(-columns // given["BLOCK_COLUMNS"]), -(-others // given["OTHER_BLOCK"])
            steps = -(-width // GROUP), -(-width // given["OTHER_WIDTH"])
            splits = given["SPLITS"], given["OTHER_SPLITS"]
            assert whole.num_programs == sum(tiles)
            assert made.num_programs == sum(t * s for t, s in zip(tiles, splits, strict=True))
            for number, split, own in zip(steps, splits, ("STEPS", "OTHER_STEPS"), strict=True):
                assert (split - 1) * given[own] < number <= split * given[own]
                assert split <= split_sums.MAX_SPLITS
            first = given["FIRST_SUM"]
            if max(splits) > 1:
                assert made.num_programs <= 396
            if splits[0] > 1:
                ends = tiles[0] * splits[0] * block * tile
                assert tiles[0] <= split_sums.NUM_COUNTERS and ends <= split_sums.NUM_PARTIALS
            if splits[1] > 1:
                size = splits[1] * block * given["OTHER_BLOCK"]
                assert first >= tiles[0]
                assert splits[0] == 1 or first * size >= tiles[0] * splits[0] * block * tile
                assert first + tiles[1] <= split_sums.NUM_COUNTERS
                assert (first + tiles[1]) * size <= split_sums.NUM_PARTIALS


def test_counters_are_zero_after_a_launch(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, values = paddle_memory, np.full(split_sums.NUM_COUNTERS + (1 << 20), np.nan, np.float32)
    values[: split_sums.NUM_COUNTERS] = 0
    scratch = m.put(values)
    monkeypatch.setattr("fd_dsa.ops.side_by_side.scratch_beside", lambda *_: scratch)
    for case, how in (cases(m)[-1], ()), (gated_cases(m)[-1], (True,)):
        case.run(*how)
        assert not m.get(scratch[: split_sums.NUM_COUNTERS]).any()


def test_a_launch_that_ends_midway_leaves_no_counts(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(paddle_memory, *SMALL[3])
    with ending_midway(paddle_memory, monkeypatch):
        case.run()
    case.check_values(case.run())


def test_captured_before_the_first_run_it_does_not_split(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Transfers, "is_capturing", lambda self: True)
    monkeypatch.setattr(split_sums, "SCRATCH", {})
    case = Case(paddle_memory, *SMALL[3])
    case.check_values(case.run())
    assert "run a step before the capture" in caplog.text and not split_sums.SCRATCH


def test_what_does_not_fit_is_refused(paddle_memory: KernelMemory) -> None:
    case = Case(paddle_memory, MAX_GATED_ROWS + 1, 256, 24, 264)
    with pytest.raises(ShapeError, match=r"got 9 rows of 264 values, .* 1 to 8 rows"):
        case.run(True)
    short = case.other[:, :128].contiguous()
    with pytest.raises(ShapeError, match="rows of 128 values in the second weight"):
        side_by_side(case.x, case.weight, short)
    with pytest.raises(ShapeError, match="got 100 columns of the gate"):
        Case(paddle_memory, 1, 200, 24, 264).run(True)
