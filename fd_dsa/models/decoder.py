"""Layers of a model, of which the compilation of kernels runs one of each kind."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar


class Layer(Protocol):
    """Decoder layer."""

    @property
    def kind(self) -> Hashable:
        """Kind of the layer. Layers of one kind launch the same kernels."""


_Layer = TypeVar("_Layer", bound=Layer)


class Decoder(Generic[_Layer]):
    """Model that runs its layers in order.

    Attributes:
        layers: decoder layers.
    """

    layers: list[_Layer]

    @contextmanager
    def one_layer_of_each_kind(self) -> Iterator[None]:
        """Run steps through the first layer of each kind inside."""
        layers = self.layers
        first = {layer.kind: layer for layer in reversed(layers)}
        self.layers = [layer for layer in layers if layer in first.values()]
        try:
            yield
        finally:
            self.layers = layers
