"""Projections with FastDeploy's keyword constructors (`model_executor/layers/linear.py`).

Weights are [in, out] in a parameter named `weight`; checkpoints hold [out, in]. There is one rank,
which has every weight whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn

from .utils import fill, loader_of, zeros_parameter


class LinearBase(nn.Layer):
    """x @ weight (+ bias); `weight.weight_loader` takes checkpoint tensors."""

    def __init__(
        self,
        fd_config: Any,
        prefix: str = "",
        input_size: int | None = None,
        output_size: int | None = None,
        with_bias: bool = False,
        skip_quant: bool = False,
        weight_dtype: str = "",
    ) -> None:
        super().__init__()
        self.fd_config, self.prefix = fd_config, prefix
        self.input_size, self.output_size, self.with_bias = input_size, output_size, with_bias
        self.skip_quant = skip_quant
        self.quant_method = self._quant_method()
        if self.quant_method is None:
            self.weight = zeros_parameter(self, [input_size, output_size], weight_dtype or None)
        else:
            self.quant_method.create_weights(self)
        self.weight.weight_loader = loader_of(self)
        self.bias = zeros_parameter(self, [output_size]) if with_bias else None
        if self.bias is not None:
            self.bias.weight_loader = loader_of(self)

    def _quant_method(self) -> Any:
        """What quantises the layer; None of the kinds that the double leaves as they are."""

    def weight_loader(self, param: Any, array: np.ndarray, shard_id: str | None = None) -> None:
        """Fill the weight, or the bias, from the checkpoint's tensor."""
        fill(param, array.T if array.ndim == 2 else array)

    def forward(self, x: Any) -> Any:
        """[num_tokens, out] of [num_tokens, in]."""
        if self.quant_method is not None:
            return self.quant_method.apply(self, x)
        y = paddle.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class ReplicatedLinear(LinearBase):
    """The same on every rank, quantised where the configuration says so."""

    def _quant_method(self) -> Any:
        quantizes = self.fd_config.quant_config is not None and not self.skip_quant
        return self.fd_config.quant_config.get_quant_method(self) if quantizes else None

    def weight_loader(self, param: Any, array: np.ndarray, shard_id: str | None = None) -> None:
        if self.quant_method is None:
            super().weight_loader(param, array, shard_id)
        else:
            self.quant_method.load(self, array.T)


class ColumnParallelLinear(LinearBase):
    """Each rank would have its share of the outputs."""


class RowParallelLinear(LinearBase):
    """Each rank would have its share of the inputs, and the results would be reduced."""


class _MergedLinear(LinearBase):
    """Several checkpoint tensors side by side in one weight; it is filled when all have come."""

    shard_ids: tuple[str, ...] = ()

    def weight_loader(self, param: Any, array: np.ndarray, shard_id: str | None = None) -> None:
        found = self.__dict__.setdefault("_shards", {}).setdefault(param.name, {})
        found[shard_id] = array.T if array.ndim == 2 else array
        if len(found) == len(self.shard_ids):
            fill(param, np.concatenate([found[one] for one in self.shard_ids], axis=-1))
            found.clear()


class MergedReplicatedLinear(_MergedLinear):
    """q_a_proj and kv_a_proj_with_mqa of an attention layer, the same on every rank."""

    shard_ids = ("q_a", "kv_a")

    def __init__(self, fd_config: Any, *args: Any, output_sizes: list[int], **kwargs: Any) -> None:
        super().__init__(fd_config, *args, output_size=sum(output_sizes), **kwargs)
        self.output_sizes = output_sizes


class MergedColumnParallelLinear(_MergedLinear):
    """gate_proj and up_proj of an MLP."""

    shard_ids = ("gate", "up")


class KVBatchLinear(nn.Layer):
    """The two halves of kv_b_proj as batched products over heads.

    `k_b_proj_weight` [heads, nope, rank] and `v_b_proj_weight` [heads, rank, v] are made from
    kv_b_proj's weight once that is loaded.
    """

    def __init__(
        self,
        fd_config: Any,
        kv_b_proj: nn.Layer | None = None,
        prefix: str = "",
        kv_lora_rank: int | None = None,
        num_attention_heads: int | None = None,
        qk_nope_head_dim: int | None = None,
        v_head_dim: int | None = None,
    ) -> None:
        super().__init__()
        # a sub-layer of the attention layer, not of this one
        self.__dict__["kv_b_proj"] = kv_b_proj
        self.prefix = prefix
        self.heads = num_attention_heads
        self.nope, self.v_dim, self.rank = qk_nope_head_dim, v_head_dim, kv_lora_rank

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
