"""Sparse MLA on tensor cores: the kernel for a number of tokens, and the memory that it needs."""

from __future__ import annotations

import logging
from typing import Any

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.device.allocation import Allocate
from fd_dsa.errors import KernelUnavailable
from fd_dsa.ops.mla.custom_op import CustomAttention
from fd_dsa.ops.mla.records import Dequantized, DequantizedRecords, keys_per_token
from fd_dsa.ops.mla.tensor_core import attend_on_tensor_cores, new_partials
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor

logger = logging.getLogger(__name__)
# with fewer prompt tokens in a step, a launch that dequantizes costs more than it saves
_MIN_PREFILL_TOKENS = 256


class TensorCoreAttention:
    """Sparse MLA on tensor cores, with memory that all layers and steps share.

    A kernel of custom_ops/ attends if it is faster for this number of tokens. It supports few heads
    over FP8 records, and more than 32 heads. With more than 32 heads over FP8 records, the records
    of prompts are dequantized first if that is faster.

    Args:
        config: supported configuration, see `tensor_core.unsupported_reason`.
        scratch: float32 [n] for dequantized records, free during `attend`.
        custom: kernel of custom_ops/ for these heads and this cache.
        always_custom: True if Triton's kernel cannot be compiled.
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
        reads_them = custom is not None and not custom.records_alone
        if reads_them and config.cache_layout.is_fp8 and scratch is not None:
            max_keys = keys_per_token(config.num_heads)
            self._records = DequantizedRecords(scratch, max_keys, config.max_num_seqs)

    def attend(
        self,
        q: Tensor,
        cache: Tensor,
        slots: Tensor,
        out: Tensor,
        lse: Tensor | None = None,
        step: ForwardMeta | None = None,
    ) -> None:
        """Attend to the slots of each token, see `attend_on_tensor_cores`.

        Args:
            step: step of the tokens, whose slots are then all in their own rows.
        """
        how: dict[str, Any] = {"softmax_scale": self._scale, "lse": lse}
        custom = self._custom
        if custom is not None and (self._always or custom.is_faster(q.shape[0], q.shape[1])):
            dequantized = self._dequantized(cache, step)
            custom(q, cache, slots, out, dequantized=dequantized, **how)
        else:
            attend_on_tensor_cores(q, cache, slots, out, partials=self._partials, **how)

    def _dequantized(self, cache: Tensor, step: ForwardMeta | None) -> Dequantized | None:
        """Dequantize the records of the step's prompts, or return None if that does not pay."""
        if self._records is None or step is None:
            return None
        if step.num_prefill_tokens < _MIN_PREFILL_TOKENS:
            return None
        try:
            return self._records.fill(cache, step)
        except KernelUnavailable as error:
            self._records = None
            logger.warning("attention of prompts: no records are dequantized first (%s)", error)
            return None
