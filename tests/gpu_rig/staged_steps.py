"""Steps whose inputs are staged, each stamped with its number, and what a reader found of them.

Three ways to the device: an `InputStaging` alone, the embedded engine's `DeviceInputs`, and
`V4Prepare`. `stage` is what the host does for a step, `expand` what the main stream does with it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import paddle

from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.device.staging import InputStaging
from fd_dsa.runner import InputBatch
from fd_dsa.runner.device_steps import DeviceInputs
from fd_dsa.runner.input_batch import SamplingInputs
from fd_dsa.triton_runtime import paddle_jit
from fd_dsa.v4_prepare import V4Prepare
from fd_dsa.v4_prepare.prepare import NUM_SLABS
from tests.gpu_rig.rig import Rig
from tests.v4_prepare.cases import serving_config

import triton.language as tl  # isort: skip

# values of a slab: 1 MiB on a GPU
LARGE, SMALL = 1 << 18, 64
_BLOCK_SIZE = 64


@paddle_jit(do_not_specialize=("first", "last", "at"))
def stamps_kernel(values_ptr, out_ptr, first, last, at):
    tl.store(out_ptr + at, tl.load(values_ptr + first))
    tl.store(out_ptr + at + 1, tl.load(values_ptr + last))


class StagedSteps:
    """Steps of one way to the device, numbered 0, 1, ..., and where found stamps are kept.

    Attributes:
        name: of the way.
    """

    name: str

    def stage(self, step: int) -> None:
        """Do the host's part of a step."""
        raise NotImplementedError

    def expand(self, step: int) -> None:
        """Do the main stream's part of a step."""
        raise NotImplementedError

    def __init__(self, rig: Rig, values: Any, max_steps: int) -> None:
        zeros = np.full(2 * max_steps, -1, np.int32)
        self.found = paddle.to_tensor(zeros, place=rig.place)
        self.note = stamps_kernel.bind(
            (1,), values, self.found, 0, 0, 0, scalars=("first", "last", "at"), num_warps=1
        )

    def wrong(self, num_steps: int) -> np.ndarray:
        """Steps of which something else than their own stamps was found; waits for the device."""
        found = self.found.numpy()[: 2 * num_steps].reshape(-1, 2)
        return np.flatnonzero((found != self.stamps(num_steps)[:, None]).any(axis=1))

    def stamps(self, num_steps: int) -> np.ndarray:
        """The stamp of each step."""
        return np.arange(num_steps)


class SlabSteps(StagedSteps):
    """An `InputStaging` alone: first and last value of each slab are the number of the step."""

    name = "InputStaging"

    def __init__(self, rig: Rig, max_steps: int, num_slabs: int = 3) -> None:
        self._size = LARGE if rig.is_real else SMALL
        self.staging = InputStaging(paddle_allocator(rig.device), self._size, num_slabs)
        self._uploaded: deque[int] = deque()
        super().__init__(rig, self.staging.slabs, max_steps)

    def stage(self, step: int) -> None:
        """Stamp a slab and queue its copy."""
        slab = self.staging.next_slab()
        slab[0] = slab[-1] = step
        self._uploaded.append(self.staging.upload(self._size))

    def expand(self, step: int) -> None:
        """Read the stamps of the earliest slab."""
        index = self._uploaded.popleft()
        self.staging.acquire(index)
        first = index * self._size
        self.note(first, first + self._size - 1, 2 * step)
        self.staging.release(index)


class RunnerSteps(StagedSteps):
    """The embedded engine's inputs: the first token id and the last block of the last row."""

    name = "DeviceInputs"

    def __init__(self, rig: Rig, max_steps: int) -> None:
        rows, columns = (256, 1024) if rig.is_real else (4, 8)
        self._batch = InputBatch(rows, 512, columns, _BLOCK_SIZE)
        self._inputs = DeviceInputs(self._batch, paddle_allocator(rig.device))
        self._wanted = np.zeros(1, np.int64)
        self._put(0)
        self._inputs.stage(self._batch.arrays(self._wanted), SamplingInputs())
        (ids, *_, tables), _ = self._inputs.views(1, rows, 1)
        self._last = (tables.data_ptr() - ids.data_ptr()) // 4 + rows * columns - 1
        super().__init__(rig, ids, max_steps)

    def _put(self, step: int) -> None:
        """A batch of two decode rows, the first and the last."""
        batch, last = self._batch, self._batch.max_num_seqs - 1
        batch.begin_step()
        batch.add_row(0, [step], 1, False)
        batch.add_row(last, [step], 1, False)
        batch.set_blocks(last, [step], start=batch.block_tables.shape[1] - 1)

    def stage(self, step: int) -> None:
        """Fill the batch and queue its copies."""
        self._put(step)
        self._inputs.stage(self._batch.arrays(self._wanted), SamplingInputs())

    def expand(self, step: int) -> None:
        """Read the stamps; the copies are queued before."""
        self.note(0, self._last, 2 * step)


class V4Steps(StagedSteps):
    """`V4Prepare`: the tokens of the first and of the last row are those of the step.

    Args:
        rig: where.
        max_steps: steps that can be noted.
    """

    name = "V4Prepare"

    def __init__(self, rig: Rig, max_steps: int) -> None:
        cfg = serving_config(*((256, 131_072, 1) if rig.is_real else (2, 256, 0)))
        rows, columns = cfg.max_num_seqs, cfg.max_blocks_per_seq
        # all need the same number of blocks: a slab of two steps, where guards are missing, then
        # still has runs that end within their rows
        self._num_lengths = cfg.block_size
        self._rows, self._first = rows, cfg.max_model_len - self._num_lengths + 1
        self.prepare = V4Prepare(cfg, rig.device)
        blocks = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
        self._q, self._slot = np.ones(rows, np.int32), np.arange(rows, dtype=np.int32)
        for row, ids in enumerate(blocks):
            self.prepare.set_blocks(row, ids)
        super().__init__(rig, self.prepare.buffers.ctx, max_steps)
        # the first brings all blocks that later steps lack; the others leave no slab of it
        for _ in range(1 + NUM_SLABS if rig.is_real else 1):
            self.stage(0)
            self.expand(0)
        paddle.device.synchronize(rig.device)

    def stamps(self, num_steps: int) -> np.ndarray:
        """The longest lengths, which differ between steps that may be mixed up."""
        return np.arange(num_steps) % self._num_lengths + self._first

    def stage(self, step: int) -> None:
        """Stage a decode step."""
        ctx = np.full(self._rows, step % self._num_lengths + self._first, np.int32)
        self.prepare.stage(ctx, self._q, self._slot)

    def expand(self, step: int) -> None:
        """Build the step and read its lengths."""
        self.prepare.expand()
        self.note(0, self._rows - 1, 2 * step)
