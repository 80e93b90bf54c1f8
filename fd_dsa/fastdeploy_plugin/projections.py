"""Weights of FastDeploy's layers in the form that our operators take them.

Source of the layers: FastDeploy's `model_executor/layers/{linear,normalization}.py` and
`layers/rotary_embedding.py`.
"""

from __future__ import annotations

from typing import Any

import paddle

from fd_dsa.attention import CacheLayout
from fd_dsa.ops._host import dtype_name, on_device, readable
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.indexer_projection import project_indexer

K_NORM_EPS = 1e-6
"""Of the indexer's key norm, whatever the model's `rms_norm_eps`, as in DeepSeek's own code."""

_PLAIN_METHOD = "UnquantizedLinearMethod"
_PLAIN_DTYPES = ("float32", "bfloat16")


class IndexerProjections:
    """`wk` and `weights_proj` of an indexer: one launch where their weights are plain.

    Quantised weights go through FastDeploy's own two products, which make temporaries of their
    own, so these never run on a second stream.

    Args:
        wk, weights_proj: FastDeploy's linear layers.
    """

    def __init__(self, wk: Any, weights_proj: Any) -> None:
        self._wk, self._weights_proj = wk, weights_proj

    def is_one_launch(self, hidden_states: Any) -> bool:
        """Whether our operator serves: plain weights of the activations' dtype, on a device."""
        return on_device(hidden_states) and all(
            _is_plain(linear, hidden_states) for linear in (self._wk, self._weights_proj)
        )

    def one_launch(self, hidden_states: Any, out: Any) -> tuple[Any, Any]:
        """Index keys and head weights, [num_tokens, ...], of [num_tokens, hidden_size].

        Args:
            hidden_states: activations on a device.
            out: where to write the two.
        """
        wk, weights_proj = self._wk.weight.detach(), self._weights_proj.weight.detach()
        return project_indexer(hidden_states, wk, weights_proj, out)

    def two_products(self, hidden_states: Any) -> tuple[Any, Any]:
        """The same by FastDeploy's layers."""
        return self._wk(hidden_states), self._weights_proj(hidden_states)


class KeyNorms:
    """Norms of a layer's keys in float32: copied once, refreshed at the same address.

    Args:
        layout: format of the caches.
        kv_norm: RMSNorm of the latent, None where it is applied already.
        k_norm: LayerNorm of the index key, None in a layer without indexer.
        rope_interleave: pairing of the index key's RoPE.

    Attributes:
        params: what `write_caches` takes.
    """

    def __init__(
        self, layout: CacheLayout, kv_norm: Any, k_norm: Any, rope_interleave: bool
    ) -> None:
        self._sources: dict[str, Any] = {}
        if kv_norm is not None:
            self._sources["kv_norm_weight"] = kv_norm.weight
        if k_norm is not None:
            self._sources |= {"k_norm_weight": k_norm.weight, "k_norm_bias": k_norm.bias}
        # of their own memory, also of float32: other weights may come at another address
        self._copies = {name: float32_of(source).clone() for name, source in self._sources.items()}
        self.params = CacheWriteParams(
            layout.kv_cache_dtype,
            kv_norm_eps=getattr(kv_norm, "eps", K_NORM_EPS),
            k_norm_eps=K_NORM_EPS,
            index_rope_interleave=rope_interleave,
            index_hadamard=layout.index_hadamard,
            index_scale_fmt=layout.index_scale_fmt,
            **{name: readable(copy) for name, copy in self._copies.items()},
        )

    def refresh(self) -> None:
        """Copy the weights again, for graphs that were captured with their copies as well."""
        with paddle.no_grad():
            for name, source in self._sources.items():
                paddle.assign(float32_of(source), output=self._copies[name])


def cos_sin_table(rotary_emb: Any) -> Any:
    """cos and sin of all positions, float32 [max_position, rope_dim]; on a CPU of NumPy."""
    return readable(float32_of(rotary_emb.cos_sin_cache))


def table_key(rotary_emb: Any) -> tuple[Any, ...]:
    """What tells the tables of two rotary embeddings apart."""
    names = ("rotary_dim", "max_position_embeddings", "base", "scaling_factor", "mscale")
    shape = tuple(rotary_emb.cos_sin_cache.shape)
    return (*shape, *(getattr(rotary_emb, name, None) for name in names))


def float32_of(tensor: Any) -> Any:
    """A tensor's values in float32; its own memory where it has that dtype."""
    tensor = tensor.detach()
    return tensor if dtype_name(tensor.dtype) == "float32" else tensor.astype("float32")


def _is_plain(linear: Any, hidden_states: Any) -> bool:
    """Whether a linear layer is x @ weight, weight [in, out] of the dtype of x."""
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
