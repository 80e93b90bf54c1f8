"""The layer that models call (`layers/attention/attention.py`)."""

from __future__ import annotations

from typing import Any

from paddle import nn


class Attention(nn.Layer):
    """Hands its arguments and itself to the step's backend."""

    def __init__(self, fd_config: Any, layer_id: int) -> None:
        super().__init__()
        self.fd_config, self.layer_id = fd_config, layer_id

    def forward(
        self,
        q: Any = None,
        k: Any = None,
        v: Any = None,
        qkv: Any = None,
        compressed_kv: Any = None,
        k_pe: Any = None,
        forward_meta: Any = None,
    ) -> Any:
        """Return the backend's result. The layer is its last argument but one."""
        return forward_meta.attn_backend.forward(
            q, k, v, qkv, compressed_kv, k_pe, self, forward_meta
        )
