"""Backend classes on CUDA by name (`platforms/cuda.py`)."""

from __future__ import annotations

from .base import _Backend


class CUDAPlatform:
    """NVIDIA GPUs."""

    device_name = "gpu"

    def get_attention_backend_cls(self, selected_backend: _Backend | None) -> str:
        """Dotted name of the class; ValueError for a name that is no backend's."""
        if selected_backend is None:
            raise ValueError("Invalid attention backend you specified")
        return f"fastdeploy.model_executor.layers.attention.{selected_backend.value}"
