"""The order in which the weights of committed goldens were drawn, each after the other."""

from __future__ import annotations

import re
from typing import TypeVar

_T = TypeVar("_T")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
# of a layer; all others that begin alike keep their order
_V32 = (
    *("input_layernorm", "post_attention_layernorm"),
    *(f"self_attn.{name}_proj.weight" for name in ("q_a", "q_b")),
    *("self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj", "self_attn.o_proj.weight"),
    *("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "self_attn.q_a_proj.bias"),
    *("self_attn.kv_a_proj_with_mqa.bias", "self_attn.o_proj.bias", "self_attn.indexer.wq_b"),
    *("self_attn.indexer.wk", "self_attn.indexer.k_norm", "self_attn.indexer.weights_proj"),
    "mlp.",
)
_COMPRESSOR = ("wkv", "wgate", "ape", "norm")
_V4 = (
    *("attn_norm", "ffn_norm", "hc_attn_", "hc_ffn_"),
    *(f"attn.{name}." for name in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm")),
    *("attn.attn_sink", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b", "attn.indexer.weights_proj"),
    *(f"attn.compressor.{name}" for name in _COMPRESSOR),
    *(f"attn.indexer.compressor.{name}" for name in _COMPRESSOR),
    *("ffn.gate.weight", "ffn.shared_experts.", "ffn.experts.", "ffn.gate.bias"),
)
_MTP = ("enorm", "hnorm", "shared_head.norm", "eh_proj", "embed_tokens", "shared_head.head")
_FIRST, _LAST = "model.embed_tokens.weight", ("model.norm.weight", "model.hc_head", "lm_head")


def in_drawn_order(tensors: dict[str, _T]) -> dict[str, _T]:
    """Tensors of a model by name, in that order."""
    mtp = {match[1] for name in tensors if (match := _LAYER.fullmatch(name)) and "enorm" in name}

    def place(name: str) -> tuple[int, int]:
        match = _LAYER.fullmatch(name)
        if name.startswith("mtp."):
            # after all others, so that a model draws the same with and without this layer
            return 1 << 21, 0
        if name.endswith("tid2eid") and match:
            return 1 << 20, int(match[1])
        if match:
            number = (1 << 19) + 1 if match[1] in mtp else int(match[1])
            return number, _rank(match[2], _MTP + _V32 + _V4)
        return (-1, 0) if name == _FIRST else (1 << 19, _rank(name, _LAST))

    return dict(sorted(tensors.items(), key=lambda item: place(item[0])))


def _rank(name: str, beginnings: tuple[str, ...]) -> int:
    return next(i for i, beginning in enumerate(beginnings) if name.startswith(beginning))
