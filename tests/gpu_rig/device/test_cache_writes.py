"""A decode step's metadata and cache writes on the device: the CPU's bytes, and nothing besides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.ops.cache_write import write_caches
from fd_dsa.step import ForwardMeta
from tests.gpu_rig import Rig
from tests.kernel_memory import open_memory
from tests.ops.cache_write_case import (
    BITS,
    BLOCK,
    ROPE,
    Case,
    arguments,
    assert_same_bytes,
    make_case,
    on_cpu,
)
from tests.step.helpers import builder_for, counts_of
from tests.strategies import StepBatch, make_batch

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

# three live rows, an idle one, and padding behind them
ROWS = [(0, 70, 1), (0, 0, 0), (0, 5, 2), (0, 64, 1)]
PADDED = 8
NUM_LAYERS = 2
# cosines and sines of more positions than any row has
ANGLES = np.random.default_rng(9).uniform(-1, 1, (256, ROPE)).astype(np.float32)


class DecodeStep:
    """Metadata of a step and the writes of its layers, all inputs and caches on the device."""

    def __init__(self, rig: Rig, dtype: str) -> None:
        self.batch = make_batch(ROWS, BLOCK, num_padded_tokens=PADDED)
        self.rig = rig
        self.builder = builder_for(self.batch, device=rig.device)
        self.tensors = [paddle.to_tensor(a, place=rig.place) for a in self.batch.inputs()]
        self.cases = [
            make_case(PADDED, dtype, seed=layer).changed(
                num_blocks=self.batch.num_blocks, cos_sin_cache=ANGLES
            )
            for layer in range(NUM_LAYERS)
        ]
        memory = open_memory("rig")
        self.layers = [arguments(memory, case) for case in self.cases]
        self.meta: ForwardMeta | None = None

    def run(self) -> None:
        """What a model does in a decode step: one build, then a write in every layer."""
        self.meta = meta = self.builder.build(*self.tensors, PADDED, **counts_of(self.batch))
        for kv_a, index_k, _, _, cos_sin, latent, index, params in self.layers:
            write_caches(
                kv_a, index_k, meta.position_ids, meta.slot_mapping, cos_sin, latent, index, params
            )

    def move_to(self, batch: StepBatch) -> None:
        """Put the inputs of another step into the same tensors."""
        self.batch = batch
        for tensor, array in zip(self.tensors, batch.inputs(), strict=True):
            tensor.copy_(paddle.to_tensor(array, place=self.rig.place), False)

    def poison(self) -> None:
        """Fill the caches with poison again, in place."""
        for case, layer in zip(self.cases, self.layers, strict=True):
            for tensor, array in zip(layer[5:7], case.poisoned_caches(), strict=True):
                tensor.copy_(paddle.to_tensor(array, place=self.rig.place), False)

    def assert_caches(self) -> None:
        """Every byte of every cache is the CPU's; what no live token wrote is still poison."""
        wanted = builder_for(self.batch).build(*self.batch.inputs(), PADDED)
        for case, layer in zip(self.cases, self.layers, strict=True):
            moved: Case = replace(
                case, position_ids=wanted.position_ids, slot_mapping=wanted.slot_mapping
            )
            found: list[Any] = [cache.numpy() for cache in layer[5:7]]
            assert_same_bytes(found, on_cpu(moved))


@pytest.mark.parametrize("dtype", BITS)
def test_a_decode_step_writes_the_bytes_of_the_cpu(rig: Rig, dtype: str) -> None:
    step = DecodeStep(rig, dtype)
    step.run()
    step.assert_caches()


@pytest.mark.parametrize("dtype", BITS)
def test_a_decode_step_makes_no_copy_no_wait_and_takes_no_memory(rig: Rig, dtype: str) -> None:
    step = DecodeStep(rig, dtype)
    # the first launch of a form compiles it
    step.run()
    step.poison()
    with rig.strict(), rig.counting() as counted:
        step.run()
    assert counted.delta == {}
    step.assert_caches()


@pytest.mark.own_process
@pytest.mark.parametrize("dtype", BITS)
def test_a_captured_step_writes_live_rows_and_no_padding(rig: Rig, dtype: str) -> None:
    step = DecodeStep(rig, dtype)
    with rig.strict():
        replay = rig.captured(step.run)
    columns = step.batch.block_tables.shape[1]
    # the same rows further on; fewer live rows; none at all
    for rows in (
        [(0, 71, 1), (0, 0, 0), (0, 62, 2), (0, 65, 1)],
        [(0, 0, 0), (0, 100, 1), (0, 0, 0), (0, 3, 1)],
        [(0, 0, 0), (0, 9, 0), (0, 0, 0), (0, 0, 0)],
    ):
        batch = make_batch(
            rows, BLOCK, seed=len(rows), num_columns=columns, num_padded_tokens=PADDED
        )
        step.move_to(replace(batch, num_blocks=step.batch.num_blocks))
        step.poison()
        with rig.counting() as counted:
            replay()
        assert counted.delta == {}
        step.assert_caches()
