"""Draws of a step on a device, as a runner queues them."""

from __future__ import annotations

from tests.kernel_memory import KernelMemory


def test_the_warm_up_draws_nothing(paddle_memory: KernelMemory) -> None:
    """160 rows of padding, more than there are slots: no token is written."""
    from fd_dsa.runner.device_draws import DeviceDraws

    draws = DeviceDraws(40, 300, paddle_memory.poisoned, most_drafts=3)
    before = draws.read_drafts().result().copy()
    draws.warm_up()
    assert (draws.read_drafts().result() == before).all()
