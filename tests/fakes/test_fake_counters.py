"""What the double counts: launches, reads of tensors, fresh tensors; by step, layer and module."""

from __future__ import annotations

from collections.abc import Iterator

import paddle
import pytest

from tests.fakes.trees import DEVELOP, installed


@pytest.fixture(autouse=True)
def tree() -> Iterator[None]:
    with installed(DEVELOP):
        yield


def test_reads_and_creations_by_python_are_events() -> None:
    from fastdeploy import _counters

    x = paddle.to_tensor([1, 2])
    with _counters.watch():
        _counters.begin_step()
        if x[0] > 0:
            int(x[1])
        with _counters.layer(3):
            x.numpy()
            paddle.zeros([5], "float32")
    x.tolist()
    reads = [(event.name, event.step, event.layer) for event in _counters.events("sync")]
    assert reads == [("__bool__", 1, None), ("__int__", 1, None), ("numpy", 1, 3)]
    (created,) = _counters.events("allocation")
    assert (created.name, created.layer, created.size) == ("zeros", 3, 20)
    assert created.module == __name__
    _counters.clear()
    assert not _counters.events("sync")


def test_operators_and_host_buffers_are_no_waits() -> None:
    from fastdeploy import _counters
    from fastdeploy._arrays import host, writable

    on_device = paddle.to_tensor([1, 2])
    on_host = _counters.on_host(paddle.to_tensor([3, 4]))
    with _counters.watch():
        assert host(on_device).tolist() == [1, 2]
        with writable(on_device) as values:
            values[0] = 7
        assert on_host[1].item() == 4
        with _counters.quiet():
            on_device.numpy()
    assert on_device.tolist() == [7, 2]
    assert not _counters.events("sync") and not _counters.events("allocation")


def test_an_operator_s_launch_has_its_module() -> None:
    from fastdeploy import _counters
    from fastdeploy.model_executor.ops import gpu

    gpu.init_signal_layerwise(None, 0)
    (event,) = _counters.events("launch", "init_signal_layerwise", "fastdeploy.")
    assert event.module == "fastdeploy.model_executor.ops.gpu"
