"""Projections (`model_executor/layers/linear.py`): one rank, which has every weight whole.

Weights are [in, out] in a parameter named `weight`; checkpoints hold [out, in]. Constructors take
what the double needs of upstream's keywords.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn

from .utils import fill, loader_of, zeros_parameter


class LinearBase(nn.Layer):
    """x @ weight; `weight.weight_loader` takes checkpoint tensors."""

    with_bias = False
    quant_method = None

    def __init__(
        self,
        fd_config: Any,
        input_size: int,
        output_size: int,
        weight_dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.weight = zeros_parameter(self, [input_size, output_size], weight_dtype)
        self.weight.weight_loader = loader_of(self)

    def weight_loader(self, param: Any, array: np.ndarray, shard_id: str | None = None) -> None:
        """Fill the weight from the checkpoint's tensor."""
        fill(param, array.T)

    def forward(self, x: Any) -> Any:
        """[num_tokens, out] of [num_tokens, in]."""
        return paddle.matmul(x, self.weight)


class ReplicatedLinear(LinearBase):
    """The same on every rank."""


class ColumnParallelLinear(LinearBase):
    """Each rank would have its share of the outputs."""


class RowParallelLinear(LinearBase):
    """Each rank would have its share of the inputs, and the results would be reduced."""


class MergedReplicatedLinear(LinearBase):
    """q_a_proj and kv_a_proj_with_mqa side by side in one weight; filled when both have come."""

    def weight_loader(self, param: Any, array: np.ndarray, shard_id: str | None = None) -> None:
        shards = self.__dict__.setdefault("_shards", {})
        shards[shard_id] = array.T
        if len(shards) == 2:
            fill(param, np.concatenate([shards["q_a"], shards["kv_a"]], axis=-1))
            shards.clear()


class KVBatchLinear(nn.Layer):
    """The two halves of kv_b_proj as batched products over heads.

    `k_b_proj_weight` [heads, nope, rank] and `v_b_proj_weight` [heads, rank, v] are made from
    kv_b_proj's weight once that is loaded.
    """

    def __init__(
        self, kv_b_proj: nn.Layer, kv_lora_rank: int, heads: int, nope: int, v_head_dim: int
    ) -> None:
        super().__init__()
        # a sub-layer of the attention layer, not of this one
        self.__dict__["kv_b_proj"] = kv_b_proj
        self.rank, self.heads, self.nope, self.v_dim = kv_lora_rank, heads, nope, v_head_dim

    def process_weights_after_loading(self) -> None:
        """Split kv_b_proj's weight [rank, heads * (nope + v)] by head into key and value part."""
        weight = self.kv_b_proj.weight.reshape([self.rank, self.heads, self.nope + self.v_dim])
        key = weight[:, :, : self.nope].transpose([1, 2, 0]).contiguous()
        value = weight[:, :, self.nope :].transpose([1, 0, 2]).contiguous()
        for name, values in (("k_b_proj_weight", key), ("v_b_proj_weight", value)):
            if not hasattr(self, name):
                setattr(self, name, zeros_parameter(self, values.shape))
            getattr(self, name).copy_(values, False)

    def forward(self, x: Any, proj_type: str = "k") -> Any:
        """[heads, num_tokens, out] of [heads, num_tokens, in]."""
        if proj_type not in ("k", "v"):
            raise ValueError(f"proj_type: got {proj_type!r}, allowed are 'k' and 'v'")
        return paddle.matmul(x, getattr(self, f"{proj_type}_b_proj_weight"))
