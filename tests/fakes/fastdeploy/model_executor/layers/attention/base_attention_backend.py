"""The methods that a runner and its layers call (`layers/attention/base_attention_backend.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass
class AttentionMetadata:
    """Fields of a step that a backend keeps."""


class AttentionBackend(ABC):
    """One object for all layers of a runner."""

    @abstractmethod
    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Called once a step, eagerly, before the model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called in every layer; on GPUs a step's `forward_mode` is always MIXED."""
        return self.forward_mixed(*args, **kwargs)

    def forward_mixed(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
