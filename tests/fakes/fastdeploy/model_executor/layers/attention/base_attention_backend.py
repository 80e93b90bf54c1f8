"""The methods that a runner and its layers call (`layers/attention/base_attention_backend.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from fastdeploy.model_executor.forward_meta import ForwardMode


@dataclass
class AttentionMetadata:
    """What a backend keeps of a step."""


class AttentionBackend(ABC):
    """One object for all layers of a runner."""

    @abstractmethod
    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Called once a step, eagerly, before the model."""

    def forward(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """Called in every layer; which method serves is the step's `forward_mode`."""
        method = {
            ForwardMode.MIXED: self.forward_mixed,
            ForwardMode.DECODE: self.forward_decode,
            ForwardMode.EXTEND: self.forward_extend,
        }[forward_meta.forward_mode]
        return method(q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta)

    def forward_mixed(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def forward_decode(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def forward_extend(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
