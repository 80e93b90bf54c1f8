"""ModelRegistry: which class serves an architecture (`model_executor/models/model_base.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle import nn


class ModelForCasualLM(nn.Layer):
    """Base of all models; spelled as upstream."""

    def __init__(self, fd_config: Any) -> None:
        super().__init__()
        self.fd_config = fd_config


class ModelRegistry:
    """Classes by architecture."""

    _classes: dict[str, type[nn.Layer]] = {}  # noqa: RUF012 - shared by design, as upstream

    @classmethod
    def register_model_class(cls, architecture: str) -> Callable[[type], type]:
        """Decorator that enters a class under an architecture."""

        def enter(model_class: type) -> type:
            cls._classes[architecture] = model_class
            return model_class

        return enter

    @classmethod
    def get_class(cls, architecture: str) -> type[nn.Layer]:
        """The class of an architecture; ValueError for an unknown one."""
        if architecture not in cls._classes:
            raise ValueError(f"architecture {architecture!r}: known are {sorted(cls._classes)}")
        return cls._classes[architecture]
