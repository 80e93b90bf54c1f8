"""The methods that a runner and its layers call (`layers/attention/base_attention_backend.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import paddle

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

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
    ) -> dict[tuple[str, int], Any]:
        """Caches by role and layer for the V1 cache manager (#7787): keys and values."""
        key_shape, value_shape = self.get_kv_cache_shape(num_blocks, kv_cache_quant_type)
        shapes = {"key": key_shape, "value": value_shape}
        return {
            (role, layer_offset + layer): paddle.zeros(shape, cache_dtype)
            for layer in range(num_layers)
            for role, shape in shapes.items()
        }

    def forward_mixed(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def forward_decode(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def forward_extend(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
