"""Names and shapes of the tensors of a DeepSeek-V4 checkpoint.

Source: DeepSeek's inference code for V4; Hugging Face transformers 5.23, models/deepseek_v4 and
conversion_mapping.py.
"""

from __future__ import annotations

import re

from fd_dsa.models.deepseek_v4.config import CSA, WINDOW, DeepseekV4Config
from fd_dsa.models.expected_tensors import EMBEDDING, LM_HEAD, ExpectedTensor, expected_tensors

FINAL_NORM = "model.norm.weight"
HEAD_HC = "model.hc_head.hc_"
# of DeepSeek's checkpoints, or of those that `save_pretrained` writes
_OTHER_NAMES = {
    "embed.weight": EMBEDDING,
    "head.weight": LM_HEAD,
    "norm.weight": FINAL_NORM,
    **{f"hc_head_{part}": f"{HEAD_HC}{part}" for part in ("fn", "base", "scale")},
}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.*)")


def tensor_name(stored: str) -> str:
    """The one name that a tensor goes by here, of either of the two that checkpoints use."""
    if match := _LAYER.fullmatch(stored):
        leaf = match[2]
        if leaf == "attn.norm.weight":
            leaf = "attn.kv_norm.weight"
        return f"model.layers.{match[1]}.{leaf}"
    return _OTHER_NAMES.get(stored, stored)


@expected_tensors.register
def _(config: DeepseekV4Config) -> dict[str, ExpectedTensor]:
    """All tensors of a DeepSeek-V4 model, as `tensor_name` calls them, in order of its layers."""
    hidden, streams = config.hidden_size, config.hc_mult
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    ids = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        for site in ("attn", "ffn"):
            mixes = (2 + streams) * streams
            parts |= _hyper(f"hc_{site}_", mixes, streams * hidden, 3)
        parts |= _attention(config, config.layer_types[layer])
        parts |= _experts(config)
        if config.mlp_layer_types[layer] == "moe":
            parts["ffn.gate.bias"] = (config.n_routed_experts,)
        else:
            table = config.vocab_size, config.num_experts_per_tok
            ids[f"{prefix}ffn.gate.tid2eid"] = ExpectedTensor(
                table, ids_below=config.n_routed_experts
            )
        shapes |= {f"{prefix}{name}": shape for name, shape in parts.items()}
    shapes |= {FINAL_NORM: (hidden,)} | _hyper(HEAD_HC, streams, streams * hidden, 1)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return {name: ExpectedTensor(shape) for name, shape in shapes.items()} | ids


def _hyper(prefix: str, mixes: int, width: int, scales: int) -> dict[str, tuple[int, ...]]:
    """What mixes residual streams."""
    return {f"{prefix}fn": (mixes, width), f"{prefix}base": (mixes,), f"{prefix}scale": (scales,)}


def _attention(config: DeepseekV4Config, kind: str) -> dict[str, tuple[int, ...]]:
    """Attention of a layer, its compressor and its indexer included."""
    heads, width, rank = config.num_attention_heads, config.head_dim, config.q_lora_rank
    hidden, low = config.hidden_size, config.o_groups * config.o_lora_rank
    shapes: dict[str, tuple[int, ...]] = {
        "attn.wq_a.weight": (rank, hidden),
        "attn.q_norm.weight": (rank,),
        "attn.wq_b.weight": (heads * width, rank),
        "attn.wkv.weight": (width, hidden),
        "attn.kv_norm.weight": (width,),
        "attn.attn_sink": (heads,),
        "attn.wo_a.weight": (low, heads * width // config.o_groups),
        "attn.wo_b.weight": (hidden, low),
    }
    if kind == WINDOW:
        return shapes
    ratio, halves = config.compress_rates[kind], 2 if kind == CSA else 1
    compressors = {"attn.compressor.": width}
    if kind == CSA:
        compressors["attn.indexer.compressor."] = config.index_head_dim
        index_width = config.index_n_heads * config.index_head_dim
        shapes["attn.indexer.wq_b.weight"] = (index_width, rank)
        shapes["attn.indexer.weights_proj.weight"] = (config.index_n_heads, hidden)
    for prefix, entry in compressors.items():
        shapes |= {
            f"{prefix}wkv.weight": (halves * entry, hidden),
            f"{prefix}wgate.weight": (halves * entry, hidden),
            f"{prefix}ape": (ratio, halves * entry),
            f"{prefix}norm.weight": (entry,),
        }
    return shapes


def _experts(config: DeepseekV4Config) -> dict[str, tuple[int, ...]]:
    hidden, width, count = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
    )
    shapes: dict[str, tuple[int, ...]] = {"ffn.gate.weight": (count, hidden)}
    for prefix in ("ffn.shared_experts.", *(f"ffn.experts.{j}." for j in range(count))):
        shapes |= {f"{prefix}w{part}.weight": (width, hidden) for part in (1, 3)}
        shapes[f"{prefix}w2.weight"] = (hidden, width)
    return shapes
