"""A group of ranks with a GPU each: its own all-reduce, and when NCCL serves.

The CUDA source runs here on emulated threads; `test_gpu_ranks` runs it on GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.distributed.device import DeviceGroup
from tests.distributed.host_gpus import HostGpus
from tests.distributed.sums import rounded, sum_of, widened
from tests.kernel_memory import open_memory

pytestmark = pytest.mark.triton
# rows and width: few rows and many, clusters of every size, rows after rows, widths in turn
SHAPES = [(1, 2048), (3, 1024), (150, 64), (1, 8), (20, 512), (2, 1000), (1, 2048), (9, 256)]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostGpus]:
    yield HostGpus(monkeypatch)
    custom_ops.use_library(None)


def shapes_for(size: int) -> list[tuple[int, int]]:
    """Those that ranks take turns at within a second or two."""
    return [(rows, width) for rows, width in SHAPES if size < 4 or rows * width <= 3072]


def part(rank: int, number: int, rows: int, width: int) -> np.ndarray:
    """Bits of a rank's part, from tiny to large."""
    rng = np.random.default_rng([rank, number])
    return rounded(rng.standard_normal((rows, width)) * 2.0 ** rng.integers(-9, 9, (rows, 1)))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_ranks_get_the_sum_in_the_order_of_ranks(gpus: HostGpus, size: int) -> None:
    memory = open_memory("interpreter")

    def work(group: DeviceGroup) -> list[np.ndarray]:
        parts = [part(group.rank, i, *shape) for i, shape in enumerate(shapes_for(size))]
        return [memory.get(group.all_reduce(memory.put(x, "bfloat16"))) for x in parts]

    sums = gpus.run(size, work)
    for number, shape in enumerate(shapes_for(size)):
        expected = sum_of([part(rank, number, *shape) for rank in range(size)])
        for found in sums:
            np.testing.assert_array_equal(found[number], expected, f"{shape}")
    assert gpus.nccl.reduced == []
    assert gpus.ipc.open_handles == 0


def test_values_that_look_like_an_empty_slot(gpus: HostGpus) -> None:
    memory = open_memory("interpreter")
    bits = np.array([[0xFFFF, 0xFFFF, 0xFFFF, 0x3F80, 0x8000, 0x8000, 0x7F80, 0xFF80]], np.uint16)

    def work(group: DeviceGroup) -> np.ndarray:
        return memory.get(group.all_reduce(memory.put(bits, "bfloat16")))

    for found in gpus.run(2, work):
        assert np.isnan(widened(found[0, :3])).all()
        np.testing.assert_array_equal(found[0, 3:], [0x4000, 0, 0, 0x7F80, 0xFF80])


@pytest.mark.parametrize("round_scales", [None, False, True])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_residual_and_norm_in_the_same_launch(
    gpus: HostGpus, rows: int, round_scales: bool | None
) -> None:
    # imports paddle
    from fd_dsa.ops._dense_kernels import quantize_rows

    memory, width, epsilon = open_memory("interpreter"), 768, 1e-6
    hidden, weight = part(9, 9, rows, width), np.linspace(0.5, 2, width, dtype=np.float32)

    def work(group: DeviceGroup) -> list[np.ndarray]:
        x = memory.put(part(group.rank, 0, rows, width), "bfloat16")
        arguments = memory.put(hidden, "bfloat16"), x, memory.put(weight), epsilon
        total, normed, fp8 = group.add_rms_norm(*arguments, round_scales=round_scales)
        if fp8 is None:
            return [memory.get(total), memory.get(normed)]
        same = quantize_rows(normed, bool(round_scales))
        np.testing.assert_array_equal(memory.get(fp8.codes), memory.get(same.codes))
        scales = memory.get(fp8.scales)[:, :rows]
        np.testing.assert_array_equal(scales, memory.get(same.scales)[:, :rows])
        return [memory.get(total), memory.get(normed), memory.get(fp8.codes), scales]

    results = gpus.run(2, work)
    sums = sum_of([part(rank, 0, rows, width) for rank in range(2)])
    total = rounded(widened(hidden) + widened(sums))
    x = widened(total).astype(np.float64)
    normed = x / np.sqrt(np.mean(x * x, 1, keepdims=True) + epsilon) * weight
    np.testing.assert_array_equal(results[0][0], total)
    np.testing.assert_allclose(widened(results[0][1]), normed, rtol=2**-8)
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


def test_nccl_serves_what_the_kernel_is_not_made_for(gpus: HostGpus) -> None:
    memory = open_memory("interpreter")

    def work(group: DeviceGroup) -> Any:
        group.barrier()
        tensors = np.full((2, 12), group.rank + 1.0, np.float32), part(group.rank, 0, 2, 12)
        odd = memory.put(tensors[1], "bfloat16")
        sums = [memory.get(group.all_reduce(x)) for x in (memory.put(tensors[0]), odd)]
        gathered = group.all_gather(memory.put(np.array([group.rank, 7])))
        return *sums, memory.get(gathered)

    for plain, narrow, gathered in gpus.run(2, work):
        np.testing.assert_array_equal(plain, np.full((2, 12), 3.0))
        np.testing.assert_array_equal(narrow, sum_of([part(rank, 0, 2, 12) for rank in range(2)]))
        np.testing.assert_array_equal(gathered, [[0, 7], [1, 7]])
    assert gpus.nccl.reduced == [24] * 4


def test_without_peer_access_nccl_serves_all_ranks(
    gpus: HostGpus, caplog: pytest.LogCaptureFixture
) -> None:
    memory, gpus.ipc.refuse = open_memory("interpreter"), (1,)
    caplog.set_level(logging.INFO)
    x = part(0, 0, 1, 64)

    def work(group: DeviceGroup) -> np.ndarray:
        return memory.get(group.all_reduce(memory.put(x, "bfloat16")))

    for found in gpus.run(2, work):
        np.testing.assert_array_equal(found, sum_of([x, x]))
    assert gpus.nccl.reduced == [64] * 2
    lines = [m for m in caplog.messages if m.startswith("all-reduce of a decode step among 2 GPUs")]
    assert sorted("NCCL (no peer access" in line for line in lines) == [False, True]
    assert all("NCCL" in line for line in lines)


def test_a_rank_that_does_not_come_is_named(gpus: HostGpus) -> None:
    memory = open_memory("interpreter")

    def work(group: DeviceGroup) -> str:
        if group.rank != 2:
            group.all_reduce(memory.put(part(0, 0, 1, 8), "bfloat16"))
        return group.failure()

    said = "rank 2 did not come to an all-reduce for 0.2 s"
    assert gpus.run(4, work, timeout_s=0.2) == [said, said, "", said]
