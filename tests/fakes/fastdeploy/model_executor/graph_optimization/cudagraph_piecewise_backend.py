"""One graph a captured size (`graph_optimization/cudagraph_piecewise_backend.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .frozen_call import FrozenCall


class CudaGraphPiecewiseBackend:
    """Warm-up, capture, then replays; inputs are neither copied nor padded.

    Attributes:
        graphs: captured call of each padded size.
        num_replays: replays of each padded size.
    """

    def __init__(self, runnable: Callable[..., Any], fd_config: Any) -> None:
        self.runnable, self.config = runnable, fd_config.graph_opt_config
        self.graphs: dict[int, FrozenCall] = {}
        self.num_replays: dict[int, int] = {}

    def __call__(self, **kwargs: Any) -> Any:
        size = self.config.real_shape_to_captured_size[kwargs["ids_remove_padding"].shape[0]]
        graph = self.graphs.get(size)
        if graph is not None:
            self.num_replays[size] = self.num_replays.get(size, 0) + 1
            return graph.replay(kwargs)
        graph = FrozenCall(self.runnable, kwargs, self.config.cudagraph_num_of_warmups)
        self.graphs[size] = graph
        return graph.output
