"""The attention layers of FastDeploy's double as graphs of the CUDA runtime, one a layer and size.

FastDeploy captures the whole model. The plug-in of these tests takes the dense layers around
attention through the host, which no graph can hold; so each attention layer is a graph of its own
here, between eager ones. The forms without a GPU keep the same calls by the double's own means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import paddle
import pytest

from fd_dsa.fastdeploy_plugin import projections
from fd_dsa.triton_runtime import paddle_jit
from tests.gpu_rig import Rig

import triton.language as tl  # isort: skip


@paddle_jit(do_not_specialize=("stride", "epsilon"))
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, stride, epsilon, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * stride + columns).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + epsilon)
    weight = tl.load(weight_ptr + columns).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, x * scale * weight)


class AttentionGraphs:
    """Takes the place of every attention layer's forward in steps that may be graphs.

    Args:
        rig: the plug-in of the session.
        runner: of the double, with a model whose sizes have not been captured.

    Attributes:
        num_replays: replays of each size.
    """

    def __init__(self, rig: Rig, runner: Any) -> None:
        self._rig, self._runner = rig, runner
        self._sizes = sorted(runner.fd_config.graph_opt_config.cudagraph_capture_sizes)
        self._graphs: dict[tuple[int, int], tuple[Any, Callable[[], Any]]] = {}
        # all that a graph's kernels read or write, for as long as the graph lives
        self._kept: list[Any] = []
        self.num_replays: dict[int, int] = {}
        for layer in runner.model.model.layers:
            attention = layer.self_attn
            attention.forward = self._forward_of(attention.layer_id, attention.forward)

    def _forward_of(self, layer_id: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(forward_meta: Any, hidden_states: Any) -> Any:
            count = hidden_states.shape[0]
            fits = forward_meta.step_use_cudagraph and count <= self._sizes[-1]
            if not fits or self._runner._has_prefill_rows():
                return original(forward_meta, hidden_states)
            size = min(one for one in self._sizes if one >= count)
            graph = self._graphs.get((layer_id, size))
            if graph is None:
                graph = self._capture(original, forward_meta, hidden_states)
                self._graphs[layer_id, size] = graph
            else:
                self.num_replays[size] = self.num_replays.get(size, 0) + 1
            inputs, replay = graph
            inputs[:count].copy_(hidden_states, False)
            return replay(forward_meta)[:count]

        return forward

    def _capture(
        self, original: Callable[..., Any], forward_meta: Any, hidden_states: Any
    ) -> tuple[Any, Callable[[Any], Any]]:
        """The input that stays where it is, and a function that replays the graph."""
        inputs = hidden_states.clone()
        if not self._rig.is_real:
            from fastdeploy.model_executor.graph_optimization.frozen_call import FrozenCall

            def run(ids_remove_padding: Any, forward_meta: Any) -> Any:
                return original(forward_meta, ids_remove_padding)

            given = {"ids_remove_padding": inputs, "forward_meta": forward_meta}
            with self._everything_kept():
                call = FrozenCall(run, given, 1)
            return inputs, lambda meta: call.replay({**given, "forward_meta": meta})
        outputs: list[Any] = []
        with self._everything_kept():
            replay = self._rig.captured(lambda: outputs.append(original(forward_meta, inputs)))
        self._kept += outputs

        def run_graph(_: Any) -> Any:
            replay()
            # the last run before this was the captured one
            return outputs[-1]

        return inputs, run_graph

    @contextmanager
    def _everything_kept(self) -> Iterator[None]:
        """Inside, no result of an operator is given back, and all operators can be captured."""
        from fastdeploy.model_executor.layers.normalization import RMSNorm

        def keep(result: Any) -> Any:
            self._kept.append(result)
            return result

        matmul, reshape, project = paddle.matmul, paddle.Tensor.reshape, projections.project_indexer

        def norm(layer: Any, x: Any, *_: Any) -> tuple[Any, Any]:
            out = keep(paddle.zeros([x.shape[0], layer.hidden_size]))
            weight, width = layer.weight.detach(), layer.hidden_size
            rms_norm_kernel[(x.shape[0],)](x, weight, out, x.strides[0], layer.eps, width)
            return out, x

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paddle, "matmul", lambda x, y: keep(matmul(keep(x.contiguous()), y)))
            patch.setattr(paddle.Tensor, "reshape", lambda x, *shape: keep(reshape(x, *shape)))
            patch.setattr(projections, "project_indexer", lambda *a, **k: keep(project(*a, **k)))
            patch.setattr(RMSNorm, "forward", norm)
            yield
