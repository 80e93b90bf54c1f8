"""What the double counts: launches, reads of tensors, fresh tensors; by layer and module."""

from __future__ import annotations

import paddle

from tests.fakes.trees import DEVELOP, installed


def test_reads_creations_and_launches_are_events_and_operators_own_reads_are_none() -> None:
    with installed(DEVELOP):
        from fastdeploy import _counters
        from fastdeploy._arrays import host, writable
        from fastdeploy.model_executor.ops import gpu

        x, on_host = paddle.to_tensor([1, 2]), _counters.on_host(paddle.to_tensor([3, 4]))
        with _counters.watch():
            if x[0] > 0:
                int(x[1])
            with _counters.layer(3):
                x.numpy()
                paddle.zeros([5], "float32")
            # neither an operator's work with memory nor buffers that the host has are waits
            assert host(x).tolist() == [1, 2]
            with writable(x) as values:
                values[0] = 7
            assert on_host[1].item() == 4
            with _counters.quiet():
                assert x.numpy().tolist() == [7, 2]
            gpu.init_signal_layerwise(None, 0)
        x.tolist()
        reads = [(event.name, event.layer) for event in _counters.events("sync")]
        assert reads == [("__bool__", None), ("__int__", None), ("numpy", 3)]
        created = _counters.events("allocation", module=__name__)
        assert [(one.name, one.layer) for one in created] == [("zeros", 3)]
        (launch,) = _counters.events("launch", "init_signal_layerwise", "fastdeploy.")
        assert launch.module == "fastdeploy.model_executor.ops.gpu"
        _counters.clear()
        assert not _counters.events("sync")
