"""Samples and logits of steps on a device, as a runner enqueues them."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.runner import InputBatch
from tests.kernel_memory import KernelMemory


def test_the_warm_up_samples_no_token(paddle_memory: KernelMemory) -> None:
    """160 rows of padding, more than there are batch rows: no token is written."""
    from fd_dsa.runner.device_steps import DeviceSteps

    batch = InputBatch(40, 40, 1, 16)
    steps = DeviceSteps(batch, 300, paddle_memory.poisoned, max_drafts=3)
    before = steps.read_drafts().result().copy()
    steps.warm_up()
    assert (steps.read_drafts().result() == before).all()


@pytest.mark.triton
def test_logits_come_in_memory_that_stays(paddle_memory: KernelMemory) -> None:
    from fd_dsa.runner.device_steps import DeviceSteps

    m = paddle_memory
    steps = DeviceSteps(InputBatch(2, 8, 1, 16), 3, m.poisoned)
    first = steps.logits_on_host(m.put(np.arange(6, dtype=np.float32).reshape(2, 3)))
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    second = steps.logits_on_host(m.put(np.float32([[9, 8, 7]])))
    assert second.tolist() == [[9, 8, 7]]
    assert second.ctypes.data == first.ctypes.data
    # prompts all of whose logits are wanted
    large = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_array_equal(steps.logits_on_host(m.put(large)), large)
