"""The counters see copies, waits and memory, and nothing where nothing happens."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle.base import core

from tests.gpu_rig import Rig, RigError, load

pytestmark = pytest.mark.gpu_rig

BYTES = 4 << 20


def test_work_on_the_device_counts_its_kernel_only(rig: Rig) -> None:
    x, y = paddle.ones([1024]), paddle.zeros([1024])
    with rig.counting() as counted:
        y.add_(x)
    assert counted.delta == {"op_kernels": 1}


def test_nothing_counts_nothing(rig: Rig) -> None:
    with rig.counting() as counted:
        pass
    assert counted.delta == {}


def test_a_copy_to_the_device_counts_with_its_bytes(rig: Rig) -> None:
    array = np.zeros(BYTES, np.uint8)
    with rig.counting() as counted:
        tensor = paddle.to_tensor(array, place=rig.place)
    delta = counted.delta
    assert delta.get("h2d", 0) + delta.get("h2d_async", 0) == 1
    assert delta["h2d_bytes"] == BYTES and "d2h_bytes" not in delta
    assert delta["peak_bytes"] >= BYTES
    with rig.counting() as counted:
        tensor.numpy()
    delta = counted.delta
    assert delta.get("d2h", 0) + delta.get("d2h_async", 0) == 1
    assert delta["d2h_bytes"] == BYTES and "h2d_bytes" not in delta
    assert delta["stream_syncs"] >= 1 and "peak_bytes" not in delta


def test_memory_counts_when_it_comes_from_the_pool_too(rig: Rig) -> None:
    del_me = paddle.empty([BYTES], "uint8")
    del del_me
    with rig.counting() as counted:
        again = paddle.empty([BYTES], "uint8")
        del again
    assert counted.delta.get("peak_bytes", 0) >= BYTES
    assert "allocations" not in counted.delta


def test_fresh_memory_counts_as_an_allocation(rig: Rig) -> None:
    # more than Paddle's pool holds
    size = core.device_memory_stat_current_value("Reserved", 0) + BYTES
    with rig.counting() as counted:
        paddle.empty([size], "uint8")
    assert counted.delta["allocations"] == 1
    assert counted.delta["allocated_bytes"] >= size


def test_a_fallback_counts_copies_both_ways(rig: Rig) -> None:
    x = paddle.ones([1024])
    with rig.counting() as counted:
        x.exp()
    assert counted.delta["h2d_bytes"] >= 4096 and counted.delta["d2h_bytes"] >= 4096


def test_waits_count(rig: Rig) -> None:
    with rig.counting() as counted:
        paddle.device.synchronize(rig.device)
    assert counted.delta == {"device_syncs": 1}
    event = paddle.device.Event()
    event.record()
    with rig.counting() as counted:
        event.synchronize()
    assert counted.delta == {"event_syncs": 1}


def test_a_process_has_one_form(rig: Rig) -> None:
    assert load(rig.form) is rig
    with pytest.raises(RigError, match=f"has the form '{rig.form}'"):
        load("real" if rig.form != "real" else "fake")
