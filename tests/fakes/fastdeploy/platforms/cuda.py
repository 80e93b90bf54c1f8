"""Which class serves which backend on CUDA (`platforms/cuda.py`)."""

from __future__ import annotations

from fastdeploy.utils import console_logger

from .base import Platform, _Backend

_PACKAGE = "fastdeploy.model_executor.layers.attention"


class CUDAPlatform(Platform):
    """NVIDIA GPUs."""

    device_name = "gpu"

    def get_attention_backend_cls(self, selected_backend: _Backend | None) -> str:
        """Dotted name of the class; ValueError for a backend that CUDA does not have."""
        classes = {
            _Backend.APPEND_ATTN: "AppendAttentionBackend",
            _Backend.MLA_ATTN: "MLAAttentionBackend",
            _Backend.DSA_ATTN: "DSAAttentionBackend",
        }
        if selected_backend not in classes:
            raise ValueError(
                "Invalid attention backend you specified, now only support [NATIVE_ATTN, "
                f"MLA_ATTN, APPEND_ATTN] in cuda place; got {selected_backend}"
            )
        console_logger.info(f"Using {selected_backend.name} backend.")
        return f"{_PACKAGE}.{classes[selected_backend]}"
