"""support_graph_optimization (`graph_optimization/decorator.py`)."""

from __future__ import annotations

from typing import Any

from .graph_optimization_backend import GraphOptBackend


def support_graph_optimization(cls: type) -> type:
    """Calls of a decorated model go through the graph backend; they take keywords alone."""
    make = cls.__init__

    def __init__(self: Any, fd_config: Any) -> None:
        make(self, fd_config)
        # no sub-layer and no parameter
        self.__dict__["graph_opt_backend"] = GraphOptBackend(self.forward, fd_config)

    def __call__(self: Any, **kwargs: Any) -> Any:
        return self.graph_opt_backend(**kwargs)

    def clear_graph_opt_backend(self: Any) -> None:
        self.graph_opt_backend.clear()

    cls.__init__, cls.__call__ = __init__, __call__
    cls.clear_graph_opt_backend = clear_graph_opt_backend
    return cls
