"""The double's graphs: what a captured call keeps, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import paddle
import pytest

from tests.fakes.trees import DEVELOP, installed


@pytest.fixture(autouse=True)
def develop() -> Iterator[None]:
    with installed(DEVELOP):
        yield


class Backend:
    """Stands for an attention backend: something of it steers the layers."""

    __module__ = "fastdeploy.model_executor.layers.attention.test"

    def __init__(self) -> None:
        self.scale, self.calls = 2, []


class Step:
    """A runner's buffers, and steps of them."""

    def __init__(self) -> None:
        self.backend = Backend()
        self.ids = paddle.zeros([8], dtype="int64")
        self.lengths = paddle.zeros([4], dtype="int32")

    def kwargs(self, ids: list[int], **fields: Any) -> dict[str, Any]:
        """A step with these tokens."""
        self.ids.copy_(paddle.to_tensor(ids, dtype="int64"), False)
        meta = {"attn_backend": self.backend, "lengths": self.lengths, **fields}
        return {"ids_remove_padding": self.ids, "forward_meta": SimpleNamespace(**meta)}

    def run(self, ids_remove_padding: Any, forward_meta: Any) -> Any:
        """What stands for the layers."""
        self.backend.calls = [*self.backend.calls, forward_meta]
        return ids_remove_padding * self.backend.scale + forward_meta.lengths.sum()


def capture(step: Step, kwargs: dict[str, Any]) -> Any:
    from fastdeploy.model_executor.graph_optimization.frozen_call import FrozenCall

    return FrozenCall(step.run, kwargs, 1)


def test_a_replay_has_the_shapes_of_the_capture_and_the_values_of_now() -> None:
    """Python's values are those of the capture; memory has those of now."""
    step = Step()
    graph = capture(step, step.kwargs([1, 2, 3, 4]))
    address = graph.output.data_ptr()
    step.backend.scale, step.backend.calls = 100, ["of now"]
    # rebinding a field is no write to the captured memory
    graph._forward_meta.lengths = paddle.ones([4], dtype="int32")
    output = graph.replay(step.kwargs([5, 6]))
    # the third and fourth token are what the step before has left there
    assert output.tolist() == [10, 12, 6, 8]
    assert output.data_ptr() == address
    # no trace is left of the captured call's own Python
    assert (step.backend.scale, step.backend.calls) == (100, ["of now"])
    assert step.ids.shape == [2]


@pytest.mark.parametrize("field", ["lengths", "slot_mapping"])
def test_a_tensor_that_moved_is_refused(field: str) -> None:
    from fastdeploy.model_executor.graph_optimization.frozen_call import GraphError

    step = Step()
    graph = capture(step, step.kwargs([1], slot_mapping=paddle.zeros([4])))
    moved = {field: paddle.zeros([4], dtype="int32")}
    with pytest.raises(GraphError, match=f"{field}: lies elsewhere"):
        graph.replay(step.kwargs([1], **moved))


def test_memory_that_was_freed_is_refused() -> None:
    from fastdeploy import _memory
    from fastdeploy.model_executor.graph_optimization.frozen_call import GraphError

    step = Step()
    cache = paddle.zeros([4, 1, 64, 656], dtype="uint8")
    graph = capture(step, step.kwargs([1], caches=[cache]))
    graph.replay(step.kwargs([1], caches=[cache]))
    _memory.free(cache)
    assert (cache.numpy() == 0xFF).all()
    with pytest.raises(GraphError, match=r"caches\[0\]: its memory was freed"):
        graph.replay(step.kwargs([1], caches=[cache]))
