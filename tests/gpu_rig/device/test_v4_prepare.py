"""Steps of DeepSeek-V4 on Paddle's device: what a step costs, and layers that are one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.triton_runtime import paddle_jit
from fd_dsa.v4_prepare import (
    OUTPUT_SHAPES,
    V4Arrays,
    V4Prepare,
    V4PrepareConfig,
    V4PrepareError,
    v4_prepare_np,
)
from tests.gpu_rig import Rig
from tests.gpu_rig.timing import Clock, Spin
from tests.v4_prepare.cases import CONFIGS, make_step, serving_config

import triton.language as tl  # isort: skip

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

ROWS, DRAFTS, SHORT, LONG = 8, 3, 1000, 131_072
TILE = 1024


@paddle_jit(do_not_specialize=("n", "column"))
def digest_kernel(
    values_ptr,
    n,
    total_ptr,
    history_ptr,
    step_ptr,
    column,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One number for all values of a buffer, or for as many as `total_ptr` says."""
    if total_ptr is not None:
        n = tl.load(total_ptr)
    total = tl.zeros([TILE], tl.int64)
    for first in range(0, n, TILE):
        offsets = first + tl.arange(0, TILE)
        values = tl.load(values_ptr + offsets, mask=offsets < n, other=0)
        total += values.to(tl.int64) * (offsets + 1)
    step = tl.load(step_ptr)
    tl.store(history_ptr + step * COLUMNS + column, tl.sum(total))


@paddle_jit
def next_step_kernel(step_ptr):
    tl.store(step_ptr, tl.load(step_ptr) + 1)


class Layers:
    """Instead of layers: they read all outputs of a step and note what they found."""

    def __init__(self, rig: Rig, prepare: V4Prepare, max_steps: int) -> None:
        buffers, names = prepare.buffers, list(OUTPUT_SHAPES(prepare.cfg))
        self.names = names
        self.step = paddle.to_tensor(np.zeros(1, np.int32), place=rig.place)
        zeros = np.zeros((max_steps, len(names)), np.int64)
        self.history = paddle.to_tensor(zeros, place=rig.place)
        total = buffers.hca_indptr[prepare.cfg.max_num_tokens :]
        self._reads = []
        for column, name in enumerate(names):
            values = getattr(buffers, name)
            size, until = int(np.prod(values.shape)), total if name == "hca_idx" else None
            arguments = (values, size, until, self.history, self.step, column)
            options: dict[str, Any] = {"COLUMNS": len(names), "TILE": TILE}
            self._reads.append(digest_kernel.bind((1,), *arguments, **options))
        self._count = next_step_kernel.bind((1,), self.step)

    def __call__(self) -> None:
        for read in self._reads:
            read()
        self._count()

    def digests(self, outputs: V4Arrays) -> list[int]:
        """What they must note of these outputs."""
        arrays = {name: getattr(outputs, name).ravel().astype(np.int64) for name in self.names}
        arrays["hca_idx"] = arrays["hca_idx"][: outputs.counts[2]]
        return [int((a * np.arange(1, len(a) + 1)).sum()) for a in arrays.values()]


def config(rig: Rig) -> V4PrepareConfig:
    """Eight rows of up to 128k tokens with three drafts; a small one where it is interpreted."""
    return serving_config(ROWS, LONG, DRAFTS) if rig.is_real else CONFIGS["decode"]


def test_layers_of_a_graph_follow_every_step(rig: Rig) -> None:
    cfg, rng = config(rig), np.random.default_rng(4)
    num_steps, most = (300, LONG) if rig.is_real else (2, cfg.max_model_len)
    prepare = V4Prepare(cfg, rig.device)
    layers = Layers(rig, prepare, num_steps + 2)
    addresses = [getattr(prepare.buffers, name).data_ptr() for name in layers.names]
    steps, rejected = [], []
    for number in range(num_steps):
        longest = min(SHORT, most // 2) + number * (most - min(SHORT, most // 2)) // num_steps
        rows = rng.integers(0, (longest, DRAFTS + 2), (cfg.max_num_seqs, 2)).tolist()
        rows[number % len(rows)] = (longest, DRAFTS + 1)
        step = make_step(cfg, rows, rng)
        back = rng.integers(0, DRAFTS + 1, len(step.ctx)).clip(max=step.ctx - step.q)
        steps.append(step)
        rejected.append(np.where(step.q > 0, back, 0).astype(np.int32))
    # written where the sampler runs; the host never knows them
    patterns = paddle.to_tensor(np.stack(rejected), place=rig.place)
    rollback = paddle.to_tensor(np.zeros_like(rejected[0]), place=rig.place)
    prepare.stage(*steps[0].arrays())
    prepare.expand(rollback)
    replay = rig.captured(layers)
    layers.step.copy_(paddle.to_tensor(np.zeros(1, np.int32), place=rig.place), False)
    with rig.strict(), rig.counting() as counted:
        for number, step in enumerate(steps):
            prepare.stage(*step.arrays())
            rollback.copy_(patterns[number], False)
            prepare.expand(rollback)
            replay()
            prepare.poll_error()
    assert "d2h" not in counted.delta and "d2h_async" not in counted.delta
    assert counted.delta["h2d_async"] == num_steps and "h2d" not in counted.delta
    found = layers.history.numpy()
    for number, (step, back) in enumerate(zip(steps, rejected, strict=True)):
        wanted = layers.digests(v4_prepare_np(cfg, step.ctx - back, *step.arrays()[1:]))
        wrong = [n for n, a, b in zip(layers.names, found[number], wanted, strict=True) if a != b]
        assert wrong == [], number
    assert addresses == [getattr(prepare.buffers, name).data_ptr() for name in layers.names]


def test_a_step_is_one_small_copy_and_takes_no_memory(rig: Rig) -> None:
    cfg, rng = config(rig), np.random.default_rng(6)
    prepare, rows = V4Prepare(cfg, rig.device), cfg.max_num_seqs
    step = make_step(cfg, [(cfg.block_size + 1, 2)] * rows, rng)
    prepare.stage(*step.arrays())
    prepare.expand()
    with rig.strict(), rig.counting() as counted:
        for grown in (1, 2, 3):
            prepare.stage(step.ctx + grown, step.q, step.slot)
            prepare.expand()
            prepare.poll_error()
    # blocks that the device has do not travel again
    assert counted.delta.pop("h2d_bytes") <= 3 * 4 * (16 + 5 * (rows + 16))
    assert counted.delta == {"h2d_async": 3}
    for name in OUTPUT_SHAPES(cfg):
        assert getattr(prepare.buffers, name).place.is_custom_place(), name


def test_an_error_of_the_device_is_not_waited_for(real_rig: Rig) -> None:
    cfg, rng = config(real_rig), np.random.default_rng(7)
    prepare, clock, spin = V4Prepare(cfg, real_rig.device), Clock(real_rig), Spin(real_rig)
    step = make_step(cfg, [(50, 1), (60, 2)], rng)
    rollback = paddle.to_tensor(np.array([0, -5], np.int32), place=real_rig.place)
    prepare.stage(*step.arrays())
    spin(20_000)
    prepare.expand(rollback)
    behind = clock.mark()
    prepare.poll_error()
    assert not clock.is_past(behind)
    clock.wait(behind)
    with pytest.raises(V4PrepareError, match="E_CTX: row 1: rollback=-5 < 0"):
        prepare.poll_error()
    prepare.poll_error()
