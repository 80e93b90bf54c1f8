"""Defaults of each family of models: what a config.json that names no value stands for.

Source: the configuration classes of Hugging Face transformers 5.23, models/deepseek_v32 and
models/glm_moe_dsa.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fd_dsa.models.config_reader import FieldReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What every model of one `model_type` has unless its config.json says otherwise.

    No field has a default here: a new family names all of them, so that it never gets another
    family's value. The names are those of config.json, but for the last.

    Attributes:
        shares_selections: a layer may attend to the choice of an earlier layer's indexer.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    indexer_rope_interleave: bool
    shares_selections: bool


OTHER_FAMILIES = (
    "fd_dsa serves models with DeepSeek Sparse Attention alone; others, DeepSeek-V3 and R1 among "
    "them, are served by FastDeploy (also through --engine fastdeploy), vLLM or SGLang"
)
"""What to do about a model of another family."""

# Source: Hugging Face transformers 5.23, one folder of models/ each
_NOT_SERVED = {
    "axk2": "low-rank gates in its norms and a gate on the output of attention",
    "deepseek_v41": (
        "compressed keys that groups of layers share, selection in two levels, n-gram memories "
        "(engram), and images"
    ),
    "dots3_note": (
        "sliding-window layers with other widths between the sparse ones, images, and audio"
    ),
    "glm5_next": (
        "linear attention (KDA) in most layers, pooled index keys (index_kpool), attention without "
        "rotary positions, hyper-connections, clamped activations, and images"
    ),
    "hy_v4": "a gate and sinks in attention, hyper-connections, and clamped activations of experts",
    "mistral_large4": (
        "layers that reuse the latents of earlier layers, layers without rotary positions, queries "
        "scaled by position, capped logits, and images"
    ),
}
"""Families with DeepSeek Sparse Attention: what they have that no served family has."""


def check_family(reader: FieldReader, served: Iterable[str]) -> str:
    """Return the `model_type` of a config.json.

    Args:
        reader: top level of the file.
        served: values that are allowed.

    Raises:
        ConfigError: another value; the message says what differs, or what serves the model.
    """
    served = tuple(served)
    model_type = reader.raw("model_type")
    if model_type is None:
        raise reader.error("model_type", None, " or ".join(served), "is this a model's file?")
    if model_type in served:
        return str(model_type)
    different = _NOT_SERVED.get(str(model_type).removesuffix("_text"), "")
    inner = reader.raw("text_config")
    found = [reader.raw("index_topk"), inner.get("index_topk") if isinstance(inner, dict) else None]
    if not different and found != [None, None]:
        different = "fd_dsa does not know its layers"
    hint = OTHER_FAMILIES
    if different:
        hint = (
            f"this family has DeepSeek Sparse Attention but is not served yet: {different}; vLLM, "
            "SGLang or Hugging Face transformers may serve it"
        )
    raise reader.error("model_type", model_type, ", ".join(map(repr, served)), hint)


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="deepseek_v32",
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            first_k_dense_replace=3,
            num_attention_heads=128,
            n_shared_experts=1,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            index_n_heads=64,
            index_head_dim=128,
            index_topk=2048,
            max_position_embeddings=163840,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            # half-split, as DeepSeek's own inference code pairs them
            indexer_rope_interleave=False,
            shares_selections=False,
        ),
        Family(
            model_type="glm_moe_dsa",
            vocab_size=154880,
            hidden_size=6144,
            intermediate_size=12288,
            moe_intermediate_size=2048,
            num_hidden_layers=78,
            first_k_dense_replace=3,
            num_attention_heads=64,
            n_shared_experts=1,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            q_lora_rank=2048,
            kv_lora_rank=512,
            qk_nope_head_dim=192,
            qk_rope_head_dim=64,
            v_head_dim=256,
            index_n_heads=32,
            index_head_dim=128,
            index_topk=2048,
            max_position_embeddings=202752,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            indexer_rope_interleave=True,
            shares_selections=True,
        ),
    )
}
