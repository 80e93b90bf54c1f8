"""Which of our own kernels serve a DeviceAttention: the fastest that take its sizes and types.

Decided when the attention is made (`fd_dsa.ops.providers`). What a kernel needs beside the buffers
of the attention counts in its memory.
"""

from __future__ import annotations

from typing import Any

from fd_dsa import custom_ops
from fd_dsa.attention import device_tiles, tensor_core_attention
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.device_logits import PageScores
from fd_dsa.attention.device_tiles import TileScores
from fd_dsa.attention.tensor_core_attention import TensorCoreAttention
from fd_dsa.ops.mla.custom_op import choose_attention, kind_for
from fd_dsa.ops.mla.triton_kernel import attend_slots
from fd_dsa.ops.providers import CUSTOM_OP, TENSOR_CORE, TRITON, Choice, choose
from fd_dsa.step import ForwardMeta
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.transfers import GpuTraits, Transfers


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


def choose_scores(config: DSABackendConfig, kind: str) -> Choice:
    """What scores the tokens of a step on a kind of device; see `providers.choose`."""
    conditions = {TENSOR_CORE: lambda: device_tiles.reason_against(config)}
    return choose("indexer_logits", kind, conditions)


def make_scores(
    config: DSABackendConfig,
    kind: str,
    allocate: Allocate,
    view: Any,
    num_logits: int,
    select_slots: Any,
    transfers: Transfers,
) -> PageScores | TileScores:
    """What scores and chooses; the other arguments are those of a TileScores."""
    if choose_scores(config, kind).provider == TRITON:
        return PageScores(config, view, num_logits, select_slots)
    rows = config.tokens_per_row
    return TileScores(config, allocate, view, num_logits, select_slots, transfers, rows)


def make_attention(
    config: DSABackendConfig, kind: str, allocate: Allocate, scratch: Any, transfers: Transfers
) -> SlotAttention | TensorCoreAttention:
    """What attends; `scratch` as of a TensorCoreAttention."""
    layout = config.cache_layout
    types = config.dtype, layout.kv_cache_dtype, layout.kv_lora_rank, layout.qk_rope_head_dim
    heads = config.num_heads
    choice = choose_attention(kind, heads, *types, transfers.capability(), allocate)
    if choice.provider == TRITON:
        return SlotAttention(config)
    own = kind_for(heads, layout.is_fp8) if choice.provider == CUSTOM_OP else None
    custom = own(custom_ops.build().kernels) if own else None
    return TensorCoreAttention(config, allocate, scratch, custom)


def kernel_bytes(config: DSABackendConfig, num_logits: int, gpu: GpuTraits) -> int:
    """Most bytes that the kernels which serve allocate beside the buffers of a DeviceAttention."""
    total = 0
    if device_tiles.reason_against(config) is None:
        total += device_tiles.tile_bytes(config, num_logits, gpu.num_processors)
    if tensor_core_attention.reason_against(config, gpu.capability) is None:
        total += tensor_core_attention.workspace_bytes(config)
    return total
