"""ModelRegistry: which class serves an architecture (`model_executor/models/model_base.py`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from paddle import nn


class ModelForCasualLM(nn.Layer):
    """Base of all models; spelled as upstream."""

    def __init__(self, fd_config: Any) -> None:
        super().__init__()
        self.fd_config = fd_config

    @classmethod
    def name(cls) -> str:
        """The architecture, under which `get_class` finds the class."""
        return cls.__name__


class ModelRegistry:
    """Classes by architecture, and the place of each, by which an object of it finds them again."""

    _classes: dict[str, type[nn.Layer]] = {}  # noqa: RUF012 - shared by design, as upstream
    _places: dict[str, tuple[str, str]] = {}  # noqa: RUF012

    @classmethod
    def register_model_class(
        cls,
        model_class: type | None = None,
        *,
        architecture: str | None = None,
        module_name: str | None = None,
        module_path: str = "fastdeploy.model_executor.models",
        category: Any = None,
        primary_use: Any = None,
    ) -> Any:
        """Enter a class, also as a decorator (#4236); a later one replaces an earlier one."""

        def enter(found: Any) -> Any:
            cls._classes[found.name()] = found
            if architecture and module_name:
                cls._places[architecture] = f"{module_path}.{module_name}", found.__name__
            return found

        decorator: Callable[[type], type] = enter
        return decorator if model_class is None else enter(model_class)

    @classmethod
    def get_class(cls, name: str) -> type[nn.Layer]:
        """The class of an architecture; ValueError for an unknown one."""
        if name not in cls._classes:
            raise ValueError(f"Model '{name}' is not registered!")
        return cls._classes[name]

    def resolve_model_cls(self, architecture: str) -> type[nn.Layer]:
        """The class by its place, as the configuration looks at it."""
        module, name = self._places[architecture]
        return getattr(import_module(module), name)
