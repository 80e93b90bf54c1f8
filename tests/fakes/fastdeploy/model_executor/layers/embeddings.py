"""The token embedding (`model_executor/layers/embeddings.py`), whole on every rank."""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddle.nn import functional

from .utils import default_weight_loader, zeros_parameter


class VocabParallelEmbedding(nn.Layer):
    """Rows of a table by token id; its parameter is `embed_tokens.embeddings.weight`."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.embeddings = nn.Layer()
        self.embeddings.weight = zeros_parameter(self, [num_embeddings, embedding_dim])
        self.embeddings.weight.weight_loader = default_weight_loader

    def forward(self, ids_remove_padding: Any, forward_meta: Any = None) -> Any:
        """[num_tokens, hidden] of int64 [num_tokens]."""
        return functional.embedding(ids_remove_padding, self.embeddings.weight)
