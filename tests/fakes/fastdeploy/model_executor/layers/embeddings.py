"""The token embedding (`model_executor/layers/embeddings.py`), whole on every rank."""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddle.nn import functional

from .utils import default_weight_loader, zeros_parameter


class _Table(nn.Layer):
    """The parameter, one level down as in FastDeploy: `embed_tokens.embeddings.weight`."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = zeros_parameter(self, [rows, width])
        self.weight.weight_loader = default_weight_loader


class VocabParallelEmbedding(nn.Layer):
    """Rows of a table by token id."""

    def __init__(
        self, fd_config: Any, num_embeddings: int, embedding_dim: int, prefix: str = ""
    ) -> None:
        super().__init__()
        self.embeddings = _Table(num_embeddings, embedding_dim)

    def forward(self, ids_remove_padding: Any, forward_meta: Any = None) -> Any:
        """[num_tokens, hidden] of int64 [num_tokens]."""
        return functional.embedding(ids_remove_padding, self.embeddings.weight)
