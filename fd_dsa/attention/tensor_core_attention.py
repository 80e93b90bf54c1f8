"""Our sparse MLA on tensor cores in the place of the kernel for every type and GPU.

A DeviceAttention holds one of these where `reason_against` finds nothing, and calls its `attend`
where it calls `attend_slots` otherwise. What it allocates serves all layers and steps.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.ops._fp8 import LATENT_WIDTH, ROPE_WIDTH
from fd_dsa.ops.sparse_mla.custom_op import MOST_HEADS
from fd_dsa.ops.sparse_mla.device import narrow_attention, wide_attention
from fd_dsa.ops.sparse_mla.tensor_core import attend_on_tensor_cores, new_partials, partial_rows
from fd_dsa.step.device import Allocate

_HOPPER = range(90, 100)
# heads up to which the kernel of custom_ops/ is at least as fast for any tokens, and tokens from
# which on it is for more heads: measured on an H200
_ALWAYS_HEADS, _FROM_TOKENS = 16, 8


def reason_against(config: DSABackendConfig, capability: int) -> str | None:
    """Why the kernels cannot serve; None if they can.

    Args:
        capability: of the GPU, 90 on Hopper.
    """
    layout = config.cache_layout
    if capability not in _HOPPER:
        return f"the GPU is of capability {capability}, tiles are made for 90"
    if config.dtype != "bfloat16":
        return f"activations are {config.dtype}, it takes bfloat16"
    if not layout.is_fp8 and layout.kv_cache_dtype == "float32":
        return "the cache is float32, it takes bfloat16 and fp8_ds_mla"
    if (layout.kv_lora_rank, layout.qk_rope_head_dim) != (LATENT_WIDTH, ROPE_WIDTH):
        return (
            f"latents of {layout.kv_lora_rank} and {layout.qk_rope_head_dim} values, it takes "
            f"{LATENT_WIDTH} and {ROPE_WIDTH}"
        )
    return None


def workspace_bytes(config: DSABackendConfig) -> int:
    """Bytes that a TensorCoreAttention of this configuration takes at most."""
    return 4 * (LATENT_WIDTH + 1) * partial_rows(config.num_heads)


class TensorCoreAttention:
    """`attend_on_tensor_cores` with memory for its splits; one layer at a time may use it.

    Few heads over FP8 records, and more than 32 heads: the kernels of custom_ops/ instead, where
    they serve, for the numbers of tokens that they are faster for.

    Args:
        config: one that `reason_against` finds nothing against.
        allocate: as of a DeviceAttention.

    Raises:
        ConfigError, BackendUnavailable: see `custom_ops.choose`.
    """

    def __init__(self, config: DSABackendConfig, allocate: Allocate) -> None:
        self._scale = config.softmax_scale
        is_narrow = config.cache_layout.is_fp8 and config.num_heads <= MOST_HEADS
        self._narrow = narrow_attention(allocate) if is_narrow else None
        self._from = 0 if config.num_heads <= _ALWAYS_HEADS else _FROM_TOKENS
        self._partials = None
        is_wide = config.num_heads > MOST_HEADS
        self._wide = wide_attention(allocate) if is_wide else None
        if self._narrow is None or self._from > 0:
            self._partials = new_partials(config.num_heads, allocate)

    def attend(self, q: Any, cache: Any, slots: Any, out: Any, lse: Any = None) -> None:
        """See `attend_on_tensor_cores`, whose arguments these are."""
        if self._narrow is not None and q.shape[0] >= self._from:
            self._narrow(q, cache, slots, out, softmax_scale=self._scale, lse=lse)
        elif self._wide is not None and self._wide.is_faster(q.shape[0], q.shape[1]):
            self._wide(q, cache, slots, out, softmax_scale=self._scale, lse=lse)
        else:
            attend_on_tensor_cores(
                q, cache, slots, out, softmax_scale=self._scale, lse=lse, partials=self._partials
            )
