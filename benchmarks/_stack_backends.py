"""Backends of a stack: as the package makes them, and with its kernels on tensor cores.

Those kernels are put into a `DeviceAttention` here as long as it does not hold them by itself; once
it does, both backends would be the same, and there is only one.
"""

from __future__ import annotations

from typing import Any

from benchmarks import _packages
from benchmarks._layer import Sizes, allocator, config_of
from benchmarks._stack_shapes import DEFAULTS, OURS
from fd_dsa.attention import DSAAttentionBackend
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.device import DeviceAttention
from fd_dsa.attention.device_tiles import TileScores
from fd_dsa.attention.tensor_core_attention import TensorCoreAttention
from fd_dsa.ops._host import check_shape
from fd_dsa.step import ForwardMeta
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.transfers import transfers_for


def holds(attention: DeviceAttention, kind: type) -> bool:
    """Whether an object of a class, or a method of one, is a part of an attention."""
    return any(isinstance(getattr(v, "__self__", v), kind) for v in vars(attention).values())


class OnTensorCores(DeviceAttention):
    """A DeviceAttention whose scores and attention are made on tensor cores."""

    def __init__(self, config: DSABackendConfig, allocate: Allocate) -> None:
        super().__init__(config, allocate)
        logits = self._buffers["logits"]
        made = self._view, logits.shape[0], self._select_slots, transfers_for(logits)
        self._tiles = TileScores(config, allocate, *made)
        self._tensor_cores = TensorCoreAttention(config, allocate)

    def begin_step(self, step: ForwardMeta | None = None) -> None:
        super().begin_step(step)
        if step is not None and step.max_seqlen_k > self.config.index_topk:
            self._tiles.prepare(step)

    def select(self, step: ForwardMeta, q: Any, weights: Any, cache: Any) -> Any:
        if step.max_seqlen_k <= self.config.index_topk:
            return super().select(step, q, weights, cache)
        slots = self._view("slots", step.position_ids.shape[0], self.config.index_topk)
        self._tiles.select(step, q, weights, cache, slots)
        return slots

    def attend(self, step: ForwardMeta, q: Any, cache: Any, selection: Any) -> Any:
        check_shape("attend", "selection", selection, (q.shape[0], None))
        out = self._view("latents", *q.shape[:2], self.config.cache_layout.kv_lora_rank)
        self._tensor_cores.attend(q, cache, selection, out)
        return out


def backends(sizes: Sizes, device: str) -> dict[str, DSAAttentionBackend]:
    """Backends by side, for rows of `sizes.context` keys; no package of another project serves.

    Returns:
        OURS, and DEFAULTS where the package does not serve with the kernels of OURS yet.
    """
    allocate = allocator(device)
    config = config_of(sizes, sizes.max_rows * sizes.context // 64)
    with _packages.hidden():
        default = DSAAttentionBackend(config, "gpu", allocate)
        if all(holds(default.attention, kind) for kind in (TileScores, TensorCoreAttention)):
            return {OURS: default}
        ours = DSAAttentionBackend(config, "gpu", allocate)
        ours.attention = OnTensorCores(config, allocate)
    return {DEFAULTS: default, OURS: ours}
