"""Names of the tensors of a DeepSeek-V4 checkpoint.

Source: DeepSeek's inference code for V4; Hugging Face transformers 5.23, models/deepseek_v4 and
conversion_mapping.py.
"""

from __future__ import annotations

import re

from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.dequantize import BLOCK, SCALE_SUFFIX
from fd_dsa.models.sources import EMBEDDING, LM_HEAD

FINAL_NORM = "model.norm.weight"
HEAD_HC = "model.hc_head.hc_"
# the layer for multi-token prediction
MTP = "mtp.0."
MTP_TOKENS, MTP_STREAMS = f"{MTP}e_proj.weight", f"{MTP}h_proj.weight"
MTP_HC, MTP_NORM = f"{MTP}hc_head_", f"{MTP}norm.weight"
# a tensor of the first of DSpark's three stages, in their place in later releases
DSPARK = f"{MTP}main_proj.weight"
# name in a checkpoint of DeepSeek, or of `save_pretrained` -> name in fd_dsa
_OTHER_NAMES = {
    "embed.weight": EMBEDDING,
    "head.weight": LM_HEAD,
    "norm.weight": FINAL_NORM,
    **{f"hc_head_{part}": f"{HEAD_HC}{part}" for part in ("fn", "base", "scale")},
}
# scales of a quantised weight, in place of `.weight`
_SCALE = ".scale"
_LAYER = re.compile(r"(?:model\.)?(layers\.\d+|mtp\.\d+)\.(.*)")


def tensor_name(stored: str) -> str:
    """Return the name in fd_dsa of a tensor with a name of either kind of checkpoint."""
    if match := _LAYER.fullmatch(stored):
        leaf = match[2]
        if leaf == "attn.norm.weight":
            leaf = "attn.kv_norm.weight"
        elif leaf.endswith(_SCALE):
            leaf = f"{leaf.removesuffix(_SCALE)}.weight{SCALE_SUFFIX}"
        prefix = "" if match[1].startswith("mtp") else "model."
        return f"{prefix}{match[1]}.{leaf}"
    return _OTHER_NAMES.get(stored, stored)


def has_whole_blocks(config: DeepseekV4Config, name: str) -> bool:
    """Return True if a device can hold a projection as FP8.

    The parts of its GEMM must begin at blocks of scales. Groups of wo_a must have whole blocks of
    inputs and outputs, and experts whole blocks of activations.
    """
    group = config.num_attention_heads * config.head_dim // config.o_groups
    widths = {
        **dict.fromkeys(("wq_a", "wkv"), (config.q_lora_rank,)),
        **dict.fromkeys(("w1", "w2", "w3"), (config.moe_intermediate_size,)),
        "wo_a": (group, config.o_lora_rank),
    }
    part = name.split(".")[-2]
    return not any(width % BLOCK for width in widths.get(part, ()))
