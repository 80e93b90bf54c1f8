"""The output projection (`model_executor/layers/lm_head.py`), whole on every rank."""

from __future__ import annotations

from typing import Any

from paddle import nn

from .linear import ReplicatedLinear


class ParallelLMHead(nn.Layer):
    """[n, vocab] of [n, hidden]; the parameter is `lm_head.linear.weight`."""

    def __init__(self, fd_config: Any, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(fd_config, embedding_dim, num_embeddings)

    def forward(self, hidden_states: Any) -> Any:
        return self.linear(hidden_states)
