"""Steps of DeepSeek-V4 on Paddle's device: what a step costs, and layers that are one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.v4_prepare import (
    OUTPUT_SHAPES,
    V4Prepare,
    V4PrepareConfig,
    V4PrepareError,
    csa_translate,
    v4_prepare_np,
)
from tests.gpu_rig import Rig
from tests.gpu_rig.timing import Clock, Spin
from tests.v4_prepare.cases import CONFIGS, make_step, rejected_drafts, serving_config

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

ROWS, DRAFTS, SHORT, LONG = 8, 3, 1000, 131_072


def config(rig: Rig) -> V4PrepareConfig:
    """Eight rows of up to 128k tokens with three drafts; a small one where it is interpreted."""
    return serving_config(ROWS, LONG, DRAFTS) if rig.is_real else CONFIGS["decode"]


def test_layers_of_a_graph_follow_every_step(rig: Rig) -> None:
    """In place of layers, copies of all outputs and the rows of chosen entries, in one graph."""
    cfg, rng = config(rig), np.random.default_rng(4)
    num_steps, most = (300, LONG) if rig.is_real else (2, cfg.max_model_len)
    prepare, names = V4Prepare(cfg, rig.device), list(OUTPUT_SHAPES(cfg))
    outputs = [getattr(prepare.buffers, name) for name in names]
    addresses = [output.data_ptr() for output in outputs]

    def put(array: np.ndarray) -> Any:
        return paddle.to_tensor(array, place=rig.place)

    steps, rejected, chosen = [], [], []
    for number in range(num_steps):
        longest = min(SHORT, most // 2) + number * (most - min(SHORT, most // 2)) // num_steps
        rows = rng.integers(0, (longest, DRAFTS + 2), (cfg.max_num_seqs, 2)).tolist()
        rows[number % len(rows)] = (longest, DRAFTS + 1)
        steps.append(make_step(cfg, rows, rng))
        rejected.append(rejected_drafts(steps[-1], DRAFTS, rng))
        shape = cfg.max_num_tokens, cfg.index_topk
        chosen.append(rng.integers(-1, cfg.max_model_len // cfg.csa_ratio, shape, np.int32))
    # written where the sampler and the indexer run; the host never knows them
    rollbacks, choices = put(np.stack(rejected)), put(np.stack(chosen))
    rollback, topk = put(rejected[0]), put(chosen[0])
    prepare.stage(*steps[0].arrays())
    prepare.expand(rollback)
    outputs.append(prepare.csa_translate(topk))
    copies = [paddle.zeros(output.shape, output.dtype) for output in outputs]
    history = [paddle.zeros([num_steps, *output.shape], output.dtype) for output in outputs]

    def layers() -> None:
        prepare.csa_translate(topk)
        for output, copy in zip(outputs, copies, strict=True):
            copy.copy_(output, False)

    replay = rig.captured(layers)
    with rig.strict(), rig.counting() as counted:
        for number, step in enumerate(steps):
            prepare.stage(*step.arrays())
            rollback.copy_(rollbacks[number], False)
            topk.copy_(choices[number], False)
            prepare.expand(rollback)
            replay()
            prepare.poll_error()
            for kept, copy in zip(history, copies, strict=True):
                kept[number].copy_(copy, False)
    assert "d2h" not in counted.delta and "d2h_async" not in counted.delta
    assert counted.delta["h2d_async"] == num_steps and "h2d" not in counted.delta
    found = [kept.numpy() for kept in history]
    for number, (step, back) in enumerate(zip(steps, rejected, strict=True)):
        out = v4_prepare_np(cfg, step.ctx - np.where(step.q > 0, back, 0), *step.arrays()[1:])
        wanted = [getattr(out, name) for name in names]
        wanted.append(csa_translate(out, step.table, chosen[number]))
        ends = {"hca_idx": out.counts[2], "rows": out.counts[3]}
        for name, kept, array in zip([*names, "rows"], found, wanted, strict=True):
            end = ends.get(name, len(array))
            np.testing.assert_array_equal(kept[number][:end], array[:end], f"{number} {name}")
    assert addresses == [getattr(prepare.buffers, name).data_ptr() for name in names]


def test_a_step_is_one_small_copy_and_takes_no_memory(rig: Rig) -> None:
    cfg, rng = config(rig), np.random.default_rng(6)
    prepare, rows = V4Prepare(cfg, rig.device), cfg.max_num_seqs
    step = make_step(cfg, [(cfg.block_size + 1, 2)] * rows, rng)
    prepare.stage(*step.arrays())
    prepare.expand()
    # the third step below takes the same slab
    paddle.device.synchronize(rig.device)
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
    end = clock.mark()
    prepare.poll_error()
    assert not clock.is_past(end)
    clock.wait(end)
    with pytest.raises(V4PrepareError, match="E_CTX: row 1: rollback=-5 < 0"):
        prepare.poll_error()
    prepare.poll_error()
