"""Which of our own kernels serve a DeviceAttention: those on tensor cores where they can.

Decided once, when the attention is made, told in the log and remembered for whoever asks what
serves. What a kernel needs beside the buffers of the attention counts in its memory.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.attention import device_tiles, tensor_core_attention
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.device_logits import PageScores
from fd_dsa.attention.device_tiles import TileScores
from fd_dsa.attention.tensor_core_attention import TensorCoreAttention
from fd_dsa.ops._provider import settle_kernel
from fd_dsa.ops.mla.triton_kernel import attend_slots
from fd_dsa.step import ForwardMeta
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.transfers import GpuTraits, Transfers

SCORES, ATTENTION = "indexer_logits", "sparse_mla"


class SlotAttention:
    """Attention by the kernel that takes every type, width and GPU.

    Args:
        config: scale and widths.
    """

    def __init__(self, config: DSABackendConfig) -> None:
        self._scale, self._rank = config.softmax_scale, config.cache_layout.kv_lora_rank

    def attend(self, q: Any, cache: Any, slots: Any, out: Any, *, step: ForwardMeta) -> None:
        """See `attend_slots`, whose arguments these are but for the step."""
        attend_slots(q, cache, slots, out, softmax_scale=self._scale, kv_lora_rank=self._rank)


def reasons_against(config: DSABackendConfig, capability: int) -> dict[str, str | None]:
    """Operator -> why its kernel on tensor cores cannot serve; None if it can.

    Args:
        capability: of the GPU, 90 on Hopper.
    """
    return {
        SCORES: device_tiles.reason_against(config),
        ATTENTION: tensor_core_attention.reason_against(config, capability),
    }


def settle_kernels(
    config: DSABackendConfig, kind: str, transfers: Transfers
) -> dict[str, str | None]:
    """`reasons_against` for a device, logged and remembered.

    Args:
        kind: of device, as `device_kind` names it.
        transfers: what is known of the device.
    """
    reasons = reasons_against(config, transfers.capability())
    for operator, reason in reasons.items():
        settle_kernel(operator, kind, reason)
    return reasons


def make_scores(
    config: DSABackendConfig,
    reason: str | None,
    allocate: Allocate,
    view: Any,
    num_logits: int,
    select_slots: Any,
    transfers: Transfers,
) -> PageScores | TileScores:
    """What scores and chooses: on tensor cores without a `reason` against it.

    The other arguments are those of a TileScores.
    """
    if reason is not None:
        return PageScores(config, view, num_logits, select_slots)
    rows = config.tokens_per_row
    return TileScores(config, allocate, view, num_logits, select_slots, transfers, rows)


def make_attention(
    config: DSABackendConfig, reason: str | None, allocate: Allocate, scratch: Any
) -> SlotAttention | TensorCoreAttention:
    """What attends: on tensor cores without a `reason` against it; see there."""
    return SlotAttention(config) if reason else TensorCoreAttention(config, allocate, scratch)


def kernel_bytes(config: DSABackendConfig, num_logits: int, gpu: GpuTraits) -> int:
    """Bytes that the kernels which serve allocate beside the buffers of a DeviceAttention."""
    reasons, total = reasons_against(config, gpu.capability), 0
    if reasons[SCORES] is None:
        total += device_tiles.tile_bytes(config, num_logits, gpu.num_processors)
    if reasons[ATTENTION] is None:
        total += tensor_core_attention.workspace_bytes(config)
    return total
