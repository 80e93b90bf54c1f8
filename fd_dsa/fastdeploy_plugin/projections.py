"""Weights of FastDeploy's layers in the formats of fd_dsa's operators.

A `Keep` makes the copies of weights. It runs a conversion once, and again into the same memory
after FastDeploy has loaded other weights.

Source of the layers: FastDeploy's `model_executor/layers/{linear,normalization}.py`,
`layers/rotary_embedding.py` and `layers/quantization/block_wise_fp8.py` (form of block-FP8
weights after loading).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeGuard

from fd_dsa.cache_formats import CacheLayout
from fd_dsa.errors import KernelUnavailable
from fd_dsa.fastdeploy_plugin.upstream import AdoptedIndexer, BlockFp8Linear, Linear, RMSNorm
from fd_dsa.ops.arrays import dtype_name, on_device, readable
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.providers import TRITON, device_kind, is_refused, refuse, selected_function
from fd_dsa.tensor import Tensor

K_NORM_EPS = 1e-6
"""Epsilon of the indexer's key norm for every model, as in DeepSeek's own code."""

Keep = Callable[[Callable[[], Any]], Any]
"""Function from a conversion of a weight to the copy that it makes."""

_OPERATOR = "indexer_projection"
_PLAIN_METHOD, _BLOCK_FP8_METHOD = "UnquantizedLinearMethod", "BlockWiseFP8LinearMethod"
_PLAIN_DTYPES = ("float32", "bfloat16")

logger = logging.getLogger(__name__)


class IndexerProjections:
    """Projections `wk` and `weights_proj` of an indexer, in one launch if their weights allow it.

    Plain weights are read in place. Block-FP8 weights are dequantised once, into copies of the
    activations' dtype (2.75 MB per layer of V3.2 in bfloat16). Other weights are multiplied by
    FastDeploy's two GEMMs. These allocate, so they never run on a second stream.

    Args:
        wk, weights_proj: FastDeploy's linear layers, loaded.
        hidden_states: [num_tokens, hidden_size], of the dtype of all steps.
        keep: function that makes the copies.

    Attributes:
        copies: dequantised weights of both layers, None for a weight that is read in place.
    """

    def __init__(self, wk: Linear, weights_proj: Linear, hidden_states: Tensor, keep: Keep) -> None:
        self._linears, self.copies = (wk, weights_proj), [None, None]
        reasons = [_one_launch_refusal(one, hidden_states) for one in self._linears]
        self._kind = device_kind(hidden_states)
        self._takes_one_launch = on_device(hidden_states) and not any(reasons)
        if self._takes_one_launch:
            dtype = dtype_name(hidden_states.dtype)
            self.copies = [
                keep(partial(_dequantized, one, dtype)) if _is_block_fp8(one) else None
                for one in self._linears
            ]
        elif on_device(hidden_states) and any(reasons):
            log_once(next(filter(None, reasons)))

    @property
    def is_one_launch(self) -> bool:
        """True if `one_launch` must be called, False for `two_gemms`."""
        is_refused_now = is_refused(_OPERATOR, self._kind, TRITON)
        return self._takes_one_launch and not is_refused_now

    def refuse(self, error: KernelUnavailable) -> None:
        """Project by GEMMs from now on, because the kernel cannot be compiled."""
        refuse(_OPERATOR, self._kind, TRITON, error)

    def one_launch(self, hidden_states: Tensor, out: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
        """Project [num_tokens, hidden_size] on a device to index keys and head weights in `out`."""
        wk, weights_proj = (
            linear.weight.detach() if copy is None else copy
            for linear, copy in zip(self._linears, self.copies, strict=True)
        )
        project = selected_function(_OPERATOR, hidden_states)
        return project(hidden_states, wk, weights_proj, out)

    def two_gemms(self, hidden_states: Tensor) -> tuple[Any, Any]:
        """Project to index keys and head weights by FastDeploy's layers."""
        wk, weights_proj = self._linears
        return wk(hidden_states), weights_proj(hidden_states)


def key_norms(
    layout: CacheLayout, kv_norm: RMSNorm | None, indexer: AdoptedIndexer | None, keep: Keep
) -> CacheWriteParams:
    """Return the norms with which `write_caches` writes a layer's keys, in float32 copies.

    Args:
        layout: format of the caches.
        kv_norm: RMSNorm of the latent, None if the latent is normed already.
        indexer: FastDeploy's indexer with the norm of the index key, None in a layer without it.
        keep: function that makes the copies.
    """
    sources: dict[str, Any] = {}
    if kv_norm is not None:
        sources["kv_norm_weight"] = kv_norm.weight
    if indexer is not None:
        norm = indexer.k_norm
        sources |= {"k_norm_weight": norm.weight, "k_norm_bias": norm.bias}
    # copies of float32 weights too, because other weights may come at another address
    copies = {name: keep(partial(_float32_copy, one)) for name, one in sources.items()}
    return CacheWriteParams(
        layout.kv_cache_dtype,
        kv_norm_eps=K_NORM_EPS if kv_norm is None else kv_norm.eps,
        k_norm_eps=K_NORM_EPS,
        index_rope_interleave=indexer is not None and indexer.rope_interleave,
        index_hadamard=layout.index_hadamard,
        index_scale_fmt=layout.index_scale_fmt,
        **{name: readable(copy) for name, copy in copies.items()},
    )


def _float32_copy(weight: Tensor) -> Tensor:
    """Return a copy of a weight in float32."""
    return float32(weight).clone()


def float32(tensor: Tensor) -> Tensor:
    """Return a tensor's values in float32, without a copy if it has that dtype."""
    tensor = tensor.detach()
    return tensor if dtype_name(tensor.dtype) == "float32" else tensor.astype("float32")


def _one_launch_refusal(linear: Linear, hidden_states: Tensor) -> str:
    """Return why fd_dsa's operator cannot multiply by a layer's weight, or "" if it can."""
    if _is_plain(linear, hidden_states) or _is_block_fp8(linear):
        return ""
    method = type(getattr(linear, "quant_method", None)).__name__
    return f"weights of {method} are neither plain nor block FP8 with float32 scales"


def _is_plain(linear: Linear, hidden_states: Tensor) -> bool:
    """Return True if a linear layer is x @ weight, weight [in, out] of the dtype of x."""
    method = getattr(linear, "quant_method", None)
    weight = getattr(linear, "weight", None)
    return (
        (method is None or type(method).__name__ == _PLAIN_METHOD)
        and not getattr(linear, "with_bias", False)
        and weight is not None
        and len(weight.shape) == 2
        and weight.shape[0] == hidden_states.shape[1]
        and weight.dtype == hidden_states.dtype
        and dtype_name(weight.dtype) in _PLAIN_DTYPES
    )


def _is_block_fp8(linear: Linear) -> TypeGuard[BlockFp8Linear]:
    """Return True for a float8_e4m3fn weight [out, in] with a float32 scale per block.

    Blackwell's scales, packed into integers, are unsupported.
    """
    method = getattr(linear, "quant_method", None)
    scale = getattr(linear, "weight_scale_inv", None)
    if type(method).__name__ != _BLOCK_FP8_METHOD or scale is None:
        return False
    extents = zip(linear.weight.shape, _block_of(linear), strict=True)
    return (
        not getattr(linear, "with_bias", False)
        and dtype_name(linear.weight.dtype) == "float8_e4m3fn"
        and dtype_name(scale.dtype) == "float32"
        and list(scale.shape) == [-(-size // block) for size, block in extents]
    )


def _block_of(linear: Linear) -> list[int]:
    """Return the rows and columns of [out, in] that share a scale."""
    return list(linear.quant_method.quant_config.weight_block_size)


def _dequantized(linear: BlockFp8Linear, dtype: str) -> Any:
    """Return a block-FP8 weight as [in, out] of a plain dtype, rounded once."""
    weight, scale = linear.weight.detach(), linear.weight_scale_inv.detach()
    for axis, block in enumerate(_block_of(linear)):
        scale = scale.repeat_interleave(block, axis)
    values = weight.astype("float32") * scale[: weight.shape[0], : weight.shape[1]]
    return values.transpose([1, 0]).astype(dtype).contiguous()


@cache
def log_once(reason: str) -> None:
    """Log why FastDeploy's GEMMs run, once for each reason."""
    logger.info(
        "fd_dsa: FastDeploy's GEMMs make the indexer's projections, without overlap: %s", reason
    )
