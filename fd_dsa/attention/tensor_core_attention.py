"""Sparse MLA on tensor cores, instead of the kernel for every type and GPU.

What it allocates serves all layers and steps.
"""

from __future__ import annotations

import logging
from typing import Any

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.device.allocation import Allocate
from fd_dsa.errors import KernelUnavailable
from fd_dsa.ops.mla.custom_op import CustomAttention
from fd_dsa.ops.mla.records import Dequantized, DequantizedRecords
from fd_dsa.ops.mla.tensor_core import attend_on_tensor_cores, new_partials
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor

logger = logging.getLogger(__name__)
# of a step, below which a launch costs more than it saves
_LEAST_PREFILL_TOKENS = 256
# what a token saves for each 64 heads where records are dequantized, over what a record costs;
# measured on an H200
_KEYS_PER_TOKEN = 128


def keys_per_token(num_heads: int) -> int:
    """Return the maximum keys a new token of rows whose records are dequantized first."""
    return _KEYS_PER_TOKEN * -(-num_heads // 64)


class TensorCoreAttention:
    """Attention on tensor cores with memory for its splits, for one layer at a time.

    Few heads over FP8 records, and more than 32 heads: a kernel of custom_ops/ instead, where it
    serves, for the numbers of tokens that it is faster for. More than 32 heads over FP8 records:
    those of prompts are dequantized first, where that is faster.

    Args:
        config: one that `tensor_core.why_not` finds nothing against.
        scratch: float32 [n] that nothing else uses during `attend`, for dequantized records.
        custom: a kernel of custom_ops/ for these heads and this cache.
        always_custom: it attends for all numbers of tokens, since Triton's cannot be compiled.
    """

    def __init__(
        self,
        config: DSABackendConfig,
        allocate: Allocate,
        scratch: Tensor | None = None,
        custom: CustomAttention | None = None,
        always_custom: bool = False,
    ) -> None:
        self._scale, self._custom, self._always = config.softmax_scale, custom, always_custom
        self._partials = None
        if custom is None or not (always_custom or custom.is_faster(1, config.num_heads)):
            self._partials = new_partials(config.num_heads, allocate)
        self._records: DequantizedRecords | None = None
        takes_them = custom is not None and not custom.records_alone
        if takes_them and config.cache_layout.is_fp8 and scratch is not None:
            most_keys = keys_per_token(config.num_heads)
            self._records = DequantizedRecords(scratch, most_keys, config.max_num_seqs)

    def attend(
        self,
        q: Tensor,
        cache: Tensor,
        slots: Tensor,
        out: Tensor,
        lse: Tensor | None = None,
        step: ForwardMeta | None = None,
    ) -> None:
        """See `attend_on_tensor_cores`. Tokens of a `step` have slots of their own rows only."""
        how: dict[str, Any] = {"softmax_scale": self._scale, "lse": lse}
        custom = self._custom
        if custom is not None and (self._always or custom.is_faster(q.shape[0], q.shape[1])):
            dequantized = self._dequantized(cache, step)
            custom(q, cache, slots, out, dequantized=dequantized, **how)
        else:
            attend_on_tensor_cores(q, cache, slots, out, partials=self._partials, **how)

    def _dequantized(self, cache: Tensor, step: ForwardMeta | None) -> Dequantized | None:
        """Records of the step's prompts, where that may save time."""
        if self._records is None or step is None:
            return None
        if step.num_prefill_tokens < _LEAST_PREFILL_TOKENS:
            return None
        try:
            return self._records.fill(cache, step)
        except KernelUnavailable as error:
            self._records = None
            logger.warning("attention of prompts: no records are dequantized first (%s)", error)
            return None
