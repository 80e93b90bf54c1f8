"""Attention of long steps divided among ranks by tokens instead of by heads.

A token reads its selected keys once for all heads of a rank. By heads every rank reads the keys of
all tokens, by tokens only those of its own part. The ranks exchange queries that are not absorbed,
and values of `v_head_dim`, because latents are several times as wide. So each rank holds both
up-projections of all heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.protocol import HostLengths, MlaLayer, PromptLimits
from fd_dsa.distributed import Group
from fd_dsa.environment import exchanged_min_tokens
from fd_dsa.ops.head_gemm import absorb_queries, join_columns
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor

if TYPE_CHECKING:
    from fd_dsa.ops.device_matrix import DeviceMatrix

logger = logging.getLogger(__name__)
# a part begins at a multiple, so that its rows of integers begin at 16 bytes as kernels expect
_UNIT = 4
Attend = Callable[[ForwardMeta, Tensor, Tensor, Tensor, Tensor], None]
"""Function of step, queries, cache, selection and result."""


class HeadExchange:
    """Exchange of heads for tokens among ranks, one object for all layers.

    All ranks must decide alike, so a decision depends only on the lengths of a step.

    Args:
        group: ranks that share the model, which `exchanges_heads`.
        view: function that returns the start of a buffer, see `buffer_view`.
        attend: attention to selected keys, for any number of heads.
    """

    def __init__(
        self, config: DSABackendConfig, group: Group, view: Callable[..., Tensor], attend: Attend
    ) -> None:
        self._config, self._group, self._view, self._attend = config, group, view, attend
        self._min_tokens = max(exchanged_min_tokens(), _UNIT * group.size)
        # first token of each part and the end of the last one
        self._bounds: list[int] = []
        # this rank's part, and its step
        self._own = slice(0)
        self._own_step: ForwardMeta | None = None
        logger.info(
            "attention of steps with prompts past %d tokens: divided by tokens from %d on",
            *(config.index_topk, self._min_tokens),
        )

    def begin_step(
        self, step: ForwardMeta, lengths: HostLengths | PromptLimits | None, has_dense: bool
    ) -> bool:
        """Divide the tokens of a step, and return whether it is divided.

        Args:
            lengths: lengths of the step's rows. A step is not divided without them, or in a
                capture, which has only their limits.
            has_dense: True if tokens of the step attend densely, by heads.
        """
        num_tokens, size = step.position_ids.shape[0], self._group.size
        if has_dense or lengths is None or isinstance(lengths, PromptLimits):
            return False
        is_long = num_tokens >= self._min_tokens and step.max_seqlen_k > self._config.index_topk
        if step.num_prefill_tokens == 0 or not is_long:
            return False
        # with as many selected keys, all tokens have the same cost
        self._bounds = [num_tokens // _UNIT * rank // size * _UNIT for rank in range(size)]
        self._bounds.append(num_tokens)
        own = self._own = slice(*self._bounds[self._group.rank :][:2])
        self._own_step = replace(step, batch_id_per_token=step.batch_id_per_token[own])
        return True

    def attend(
        self, q: Tensor, cos_sin: Tensor, cache: Tensor, selection: Tensor, layer: MlaLayer
    ) -> Tensor:
        """Attend for a layer of a divided step.

        Args:
            q: [num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim], as projected.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.
            cache: latents of the layer, this step's included.
            selection: int32 [num_tokens, topk], result of `select`.

        Returns:
            [num_tokens, num_heads * v_head_dim], which the next layer overwrites.
        """
        assert self._own_step is not None, "only called in a divided step"
        keys, values = (_whole(weight) for weight in (layer.k_b_proj, layer.v_b_proj))
        own = self._own
        count = own.stop - own.start
        query, latents = self._view("whole_q", count), self._view("whole_latents", count)
        absorb_queries(self._to_tokens(q, count), keys.values, cos_sin[own], query)
        self._attend(self._own_step, query, cache, selection[own], latents)
        return self._to_heads(values.matmul_by_head(latents), q.shape[0])

    def _to_tokens(self, q: Tensor, count: int) -> Tensor:
        """Return the queries of all heads of this rank's tokens."""
        size, (num_tokens, heads, width) = self._group.size, q.shape
        rows, parts = q.reshape([num_tokens, -1]), self._view("parts", size * count, heads * width)
        self._group.exchange_rows(rows, self._bounds, parts, range(0, size * count + 1, count))
        joined = self._view("whole", count, size * heads * width)
        join_columns(parts.reshape([size, count, -1]), joined)
        return joined.reshape([count, size * heads, width])

    def _to_heads(self, values: Tensor, num_tokens: int) -> Tensor:
        """Return the values of this rank's heads of all tokens."""
        size, count = self._group.size, values.shape[0]
        width = values.shape[1] // size * values.shape[2]
        parts = self._view("parts", size * count, width)
        # rows and parts change places
        join_columns(values.reshape([count, size, width]), parts.reshape([size, -1]))
        found = self._view("whole", num_tokens, width)
        self._group.exchange_rows(parts, range(0, size * count + 1, count), found, self._bounds)
        return found


def exchanges_heads(group: Group) -> bool:
    """Return whether ranks divide long steps by tokens, and hold the heads of all ranks."""
    return exchanged_min_tokens() > 0 and group.gathers_rows


def _whole(weight: object) -> DeviceMatrix:
    """Return the weight of the heads of all ranks."""
    whole = cast("DeviceMatrix", weight).whole
    assert whole is not None, "a rank that exchanges heads loads its own into such a weight"
    return whole
