"""Steps that run as graphs (`graph_optimization/graph_optimization_backend.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cudagraph_piecewise_backend import CudaGraphPiecewiseBackend


class GraphOptBackend:
    """Runs a model eagerly, or hands a step to its graphs."""

    def __init__(self, runnable: Callable[..., Any], fd_config: Any) -> None:
        self.runnable, self.fd_config = runnable, fd_config
        self.cudagraphs = CudaGraphPiecewiseBackend(runnable, fd_config)

    def __call__(self, **kwargs: Any) -> Any:
        forward_meta, config = kwargs["forward_meta"], self.fd_config.graph_opt_config
        num_tokens = kwargs["ids_remove_padding"].shape[0]
        wanted = config.use_cudagraph and forward_meta.step_use_cudagraph
        # in a piecewise graph attention runs eagerly (FLAGS_cuda_graph_blacklist), as all does here
        whole = config.graph_opt_level == 0 or config.full_cuda_graph
        if wanted and whole and num_tokens <= config.max_capture_size:
            return self.cudagraphs(**kwargs)
        return self.runnable(**kwargs)

    def clear(self) -> None:
        """Forget all graphs."""
        self.cudagraphs = CudaGraphPiecewiseBackend(self.runnable, self.fd_config)
