"""Names and shapes of the tensors that a model's checkpoint must hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.moe import gated
from fd_dsa.models.registry import FAMILIES, FamilyConfig
from fd_dsa.models.sources import MTP_JOIN

EXPERT = ".experts."
"""Part of the names of routed experts."""
# projections of DeepSeek-V4 that share a GEMM with FP8 ones
_NEVER_FP8 = ".compressor.", ".weights_proj."


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold.

    Attributes:
        shape: stored shape. Weights of GEMMs are [out, in].
        quantisable: True if it may be stored as FP8 with a `_scale_inv` companion.
        may_be_fp4: True if it may be stored as FP4 with such a companion.
        may_be_packed: True if it may have four bits in the layout of a `Packing`.
        ids_below: one more than the largest of its int64 ids, 0 = floating-point values.
    """

    shape: tuple[int, ...]
    quantisable: bool = False
    ids_below: int = 0
    may_be_fp4: bool = False
    may_be_packed: bool = False

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def expected_tensors(config: FamilyConfig) -> dict[str, ExpectedTensor]:
    """Return all tensors that the layers of a model ask for, by Hugging Face name.

    A loaded MTP layer has some. Experts are listed one by one, as checkpoints store them. A layer
    whose indexer is shared has no indexer tensors. A model whose head is tied to the embedding has
    no `lm_head.weight`.

    Cost: the model is built without weights, and Paddle is not imported.
    """
    fp4_experts = isinstance(config, DeepseekV4Config) and config.expert_dtype == "fp4"
    weights = _Expected(fp4_experts=fp4_experts, packed=config.packing is not None)
    FAMILIES[config.model_type].model(config, weights)
    return weights.tensors


class _Expected:
    """Notes of the tensors that layers ask for, with the methods of HostWeights."""

    group = None
    are_on_device = False
    fp8: frozenset[str] = frozenset()

    def __init__(self, *, fp4_experts: bool, packed: bool) -> None:
        self.tensors: dict[str, ExpectedTensor] = {}
        self._fp4_experts, self._packed = fp4_experts, packed

    def vector(self, parts: Mapping[str, int], factor: float = 1.0) -> None:
        self.tensors |= {name: ExpectedTensor((length,)) for name, length in parts.items()}

    bias = vector

    def norm(self, name: str, width: int, epsilon: float) -> None:
        self.vector({name: width})

    def table(self, name: str, rows: int, width: int) -> tuple[None, None]:
        self.tensors[name] = ExpectedTensor((rows, width))
        return None, None

    def matrix(
        self, in_width: int, parts: Mapping[str, int], *, sums_in_float32: bool = False
    ) -> None:
        for name, width in parts.items():
            fp4 = self._fp4_experts and EXPERT in name
            fp8 = not (fp4 or sums_in_float32 or name.endswith(MTP_JOIN))
            self.tensors[name] = ExpectedTensor(
                (width, in_width), fp8, may_be_fp4=fp4, may_be_packed=self._packed
            )

    def columns(
        self, in_width: int, parts: Mapping[str, int], factors: Mapping[str, float]
    ) -> None:
        for name, width in parts.items():
            self.matrix(in_width, {name: width}, sums_in_float32=name in factors)

    def placed(self, in_width: int, places: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        for name, pieces in places.items():
            in_float = any(part in name for part in _NEVER_FP8)
            widths = {name: sum(width for _, width in pieces)}
            self.matrix(in_width, widths, sums_in_float32=in_float)

    def grouped(self, name: str, groups: int, in_width: int, out_width: int) -> None:
        self.matrix(in_width, {name: groups * out_width})

    def ids(self, name: str, rows: int, width: int, below: int) -> None:
        self.tensors[name] = ExpectedTensor((rows, width), ids_below=below)

    def by_head(
        self, name: str, heads: int, key_width: int, value_width: int, rank: int
    ) -> tuple[None, None]:
        self.matrix(rank, {name: heads * (key_width + value_width)})
        return None, None

    def experts(self, prefix: str, count: int, hidden_size: int, width: int) -> None:
        for i in range(count):
            gated(self, f"{prefix}{i}.", hidden_size, width)

    def constant(self, make: Callable[[], np.ndarray]) -> None:
        """Ignore a table that is computed and not loaded."""

    def fills(self, name: str, target: np.ndarray) -> None:
        self.tensors[name] = ExpectedTensor((len(target), math.prod(target.shape[1:])))
