"""Staged steps on a device: copies on a stream of their own, one launch a step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fd_dsa.step.staging import InputStaging
from fd_dsa.v4_prepare.buffers import Allocate, Array, V4Buffers
from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.launch import ExpandLaunch
from fd_dsa.v4_prepare.slab import ERROR_SLOTS, ERROR_WORDS, SlabLayout

Int32Array = npt.NDArray[np.int32]


class DeviceSteps:
    """Slabs and outputs on a device.

    Args:
        cfg: sizes of the steps.
        layout: of a slab.
        buffers: the outputs.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        num_slabs: slabs that take turns.
    """

    def __init__(
        self,
        cfg: V4PrepareConfig,
        layout: SlabLayout,
        buffers: V4Buffers,
        allocate: Allocate,
        num_slabs: int,
    ) -> None:
        self._num_words = layout.num_words
        self.staging = InputStaging(allocate, layout.num_words, num_slabs)
        # page-locked: the kernel writes a fault to the host itself, no copy is needed to see one
        memory = self.staging.transfers.host_buffer(4 * ERROR_SLOTS * ERROR_WORDS)
        self.faults: Int32Array = memory.view(np.int32).reshape(ERROR_SLOTS, ERROR_WORDS)
        self._launch = ExpandLaunch(cfg, layout, buffers, self.staging.slabs, self.faults)
        self.next_slab, self.upload = self.staging.next_slab, self.staging.upload

    def is_done(self, slab: int) -> bool:
        """Whether the step that was expanded from a slab last has run."""
        return self.staging.used(slab).done()

    def expand(self, slab: int, rollback: Array | None) -> None:
        """Queue the launch of the step in a slab behind its copy."""
        self.staging.acquire(slab)
        self._launch(slab * self._num_words, rollback)
        self.staging.release(slab)
