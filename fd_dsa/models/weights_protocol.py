"""Interface between layers and the holder of their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fd_dsa.distributed import Group


class Weights(Protocol):
    """Holder of a model's weights, which a layer asks for by their Hugging Face names.

    HostWeights and DeviceWeights hold weights. For the list of expected tensors a third class only
    notes names and shapes, and returns None.

    Attributes:
        group: ranks that share the model; None = one rank.
        fp8: names of the tensors that are held as FP8.
        are_on_device: True for weights of layers that run kernels.
    """

    @property
    def group(self) -> Group | None: ...

    @property
    def fp8(self) -> Collection[str]: ...

    @property
    def are_on_device(self) -> bool: ...

    def vector(self, parts: Mapping[str, int]) -> Any:
        """Return vectors end to end, float32 [sum of the lengths]."""

    def bias(self, parts: Mapping[str, int]) -> Any:
        """Return a `vector` for the results of a GEMM, in their dtype."""

    def norm(self, name: str, width: int, epsilon: float) -> Any:
        """Return an RMSNorm with a weight."""

    def table(self, name: str, rows: int, width: int) -> tuple[Any, Any]:
        """Return the embedding [rows, width], and its memory as the weight of a head."""

    def matrix(
        self, in_width: int, parts: Mapping[str, int], *, sums_in_float32: bool = False
    ) -> Any:
        """Return the weight of a GEMM whose outputs are those of the parts side by side."""

    def columns(self, in_width: int, parts: Mapping[str, int], factors: Mapping[str, float]) -> Any:
        """Return a `matrix` some of whose parts are multiplied by a factor."""

    def by_head(
        self, name: str, heads: int, key_width: int, value_width: int, rank: int
    ) -> tuple[Any, Any]:
        """Return both halves of each head of kv_b_proj."""

    def experts(self, prefix: str, count: int, hidden_size: int, width: int) -> Any:
        """Return gate_up and down of all experts."""

    def constant(self, make: Callable[[], np.ndarray]) -> Any:
        """Return a table of float32 that is computed and not loaded."""

    def grouped(self, name: str, groups: int, in_width: int, out_width: int) -> Any:
        """Return the weight of a GEMM per group."""

    def ids(self, name: str, rows: int, width: int, below: int) -> Any:
        """Return a table of ids from 0 to below `below`, int32 [rows, width]."""


class HostOnlyWeights(Weights, Protocol):
    """Holder of weights with the further kinds that DeepSeek-V4 asks for on a CPU."""

    def vector(self, parts: Mapping[str, int], factor: float = 1.0) -> Any:
        """Return vectors end to end, times a factor, float32 [sum of the lengths]."""

    def placed(self, in_width: int, places: Mapping[str, Sequence[tuple[int, int]]]) -> Any:
        """Return a `matrix` whose parts need not be side by side."""

    def fills(self, name: str, target: np.ndarray) -> None:
        """Register a loader that copies the tensor `name` to `target`."""
