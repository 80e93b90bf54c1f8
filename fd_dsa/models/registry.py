"""Registry of model families, one entry per `model_type`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.config_reader import FieldReader, has_file, read_json_object
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.tensors import tensor_name
from fd_dsa.models.defaults import DeepseekV4Defaults, FamilyDefaults, ModelDefaults
from fd_dsa.models.family_fields import read_generation
from fd_dsa.models.quantization import with_formats

if TYPE_CHECKING:
    from fd_dsa.models.checkpoint import Checkpoint
    from fd_dsa.models.deepseek_v4.device_model import DeviceV4ForCausalLM
    from fd_dsa.models.deepseek_v4.model import DeepseekV4ForCausalLM
    from fd_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM
    from fd_dsa.models.weights_protocol import Weights

FamilyConfig = ModelConfig | DeepseekV4Config
"""Configuration of a model of any family."""
FamilyModel: TypeAlias = "DeepseekV32ForCausalLM | DeepseekV4ForCausalLM | DeviceV4ForCausalLM"
"""Model of any family."""
Defaults = TypeVar("Defaults", bound=FamilyDefaults)
_Given = TypeVar("_Given", contravariant=True)


class ConfigClass(Protocol[_Given]):
    """Configuration class of a family."""

    def read(self, reader: FieldReader, defaults: _Given) -> FamilyConfig:
        """Read a configuration from config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(Generic[Defaults]):
    """Entry of one family.

    Attributes:
        defaults: `model_type`, and the value of each field that config.json may omit.
        config: configuration class. Its `cache_layout` describes the caches, and
            `fd_dsa.engine.caches` has an attention backend for each configuration class.
        model: constructor of the model, from a configuration and the weights.
        tensor_name: function from the name of a tensor in a checkpoint to its name in fd_dsa; None
            = the names are equal.
        chat_formats: tool-call formats that the family writes, newest first; keys of
            `fd_dsa.chat.parser.TOOL_FORMATS`. The first one also selects the prompt encoding of a
            model folder without a chat template.
        fastdeploy_class: FastDeploy's model class whose layers the plug-in replaces; "" = none.
    """

    defaults: Defaults
    config: ConfigClass[Defaults]
    model: Callable[[Any, Any], FamilyModel]
    tensor_name: Callable[[str], str] | None = None
    chat_formats: tuple[str, ...] = ()
    fastdeploy_class: str = ""


# layers are imported when a model is created, so that a process that only tokenizes loads none
def _deepseek_v32(config: ModelConfig, weights: Weights) -> FamilyModel:
    from fd_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM

    return DeepseekV32ForCausalLM(config, weights)


def _deepseek_v4(config: DeepseekV4Config, weights: Any) -> FamilyModel:
    if weights.are_on_device:
        from fd_dsa.models.deepseek_v4.device_model import DeviceV4ForCausalLM

        return DeviceV4ForCausalLM(config, weights)
    from fd_dsa.models.deepseek_v4.model import DeepseekV4ForCausalLM

    return DeepseekV4ForCausalLM(config, weights)


# Source of the defaults: the configuration classes of Hugging Face transformers 5.23
FAMILIES: dict[str, Family[Any]] = {
    family.defaults.model_type: family
    for family in (
        Family(
            config=ModelConfig,
            model=_deepseek_v32,
            chat_formats=("deepseek_v32", "deepseek_v31"),
            fastdeploy_class="DeepseekV32ForCausalLM",
            defaults=ModelDefaults(
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
                # half-split pairs, as in DeepSeek's own inference code
                indexer_rope_interleave=False,
                shares_selections=False,
            ),
        ),
        # GLM-5 has the layers of DeepSeek-V3.2 with other sizes, interleaved pairs in the indexer's
        # RoPE and, with IndexShare, layers without an indexer
        Family(
            config=ModelConfig,
            model=_deepseek_v32,
            chat_formats=("glm47",),
            fastdeploy_class="GlmMoeDsaForCausalLM",
            defaults=ModelDefaults(
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
        ),
        Family(
            config=DeepseekV4Config,
            model=_deepseek_v4,
            tensor_name=tensor_name,
            chat_formats=("deepseek_v4",),
            defaults=DeepseekV4Defaults(
                model_type="deepseek_v4",
                vocab_size=129280,
                hidden_size=4096,
                moe_intermediate_size=2048,
                num_hidden_layers=43,
                num_attention_heads=64,
                head_dim=512,
                q_lora_rank=1024,
                o_groups=8,
                o_lora_rank=1024,
                sliding_window=128,
                index_n_heads=64,
                index_head_dim=128,
                index_topk=512,
                num_experts_per_tok=6,
                n_routed_experts=256,
                max_position_embeddings=1048576,
                hc_mult=4,
                hc_sinkhorn_iters=20,
                routed_scaling_factor=1.5,
                swiglu_limit=10.0,
                rms_norm_eps=1e-6,
                hc_eps=1e-6,
            ),
        ),
    )
}
"""Supported model families by `model_type`."""

OTHER_FAMILIES = (
    "fd_dsa serves only models with DeepSeek Sparse Attention; others, DeepSeek-V3 and R1 among "
    "them, are served by FastDeploy (also through --engine fastdeploy), vLLM or SGLang"
)
"""Advice for a model without DeepSeek Sparse Attention."""

# unsupported family with DeepSeek Sparse Attention -> its additional layers and inputs
# Source: Hugging Face transformers 5.23, one folder of models/ each
_UNSUPPORTED = {
    "axk2": "low-rank gates in its norms and a gate on the output of attention",
    "deepseek_v4_vision": "images",
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


def find_family(reader: FieldReader) -> Family[Any]:
    """Return the family that `model_type` of a config.json names.

    Args:
        reader: top level of the file.

    Raises:
        ConfigError: the family is unsupported. The message names its additional parts, or
            programs that serve it.
    """
    model_type = reader.raw("model_type")
    if model_type is None:
        raise reader.error("model_type", None, " or ".join(FAMILIES), "is this a model's file?")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    different = _UNSUPPORTED.get(str(model_type).removesuffix("_text"), "")
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
    raise reader.error("model_type", model_type, ", ".join(map(repr, FAMILIES)), hint)


def read_config(folder: str | os.PathLike[str], *, allow_unknown: bool = False) -> FamilyConfig:
    """Return the configuration of the model in a folder.

    Reads config.json, and generation_config.json and hf_quant_config.json if there are such.

    Args:
        folder: model folder in Hugging Face format.
        allow_unknown: see `config_from_dict`.

    Raises:
        ConfigError: a file is missing or damaged, or a value is unsupported. The message names
            the file and the field.
    """
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    proposed = read_json_object(generation) if has_file(generation) else None
    data, formats = read_json_object(path), Path(folder) / "hf_quant_config.json"
    if has_file(formats):
        data = with_formats(data, read_json_object(formats))
    return config_from_dict(data, str(path), proposed, str(generation), allow_unknown=allow_unknown)


def config_from_dict(
    data: dict[str, Any],
    source: str = "config.json",
    generation: dict[str, Any] | None = None,
    generation_source: str = "generation_config.json",
    *,
    allow_unknown: bool = False,
) -> FamilyConfig:
    """Return the configuration in parsed JSON.

    Args:
        data, generation: parsed config.json and generation_config.json.
        source, generation_source: names of the files in messages.
        allow_unknown: True lists unknown fields in `unknown_fields`. False refuses them, except
            for fields of `known_fields`.

    Raises:
        ConfigError: a value is unsupported, or a field is unknown.
    """
    reader = FieldReader(data, source)
    family = find_family(reader)
    config = family.config.read(reader, family.defaults)
    unknown = reader.unknown_fields(allowed=allow_unknown)
    proposed, end_tokens = read_generation(
        FieldReader(generation or {}, generation_source), config.vocab_size, config.eos_token_ids
    )
    return replace(config, unknown_fields=unknown, generation=proposed, eos_token_ids=end_tokens)


def open_checkpoint(config: FamilyConfig, folder: str | os.PathLike[str]) -> Checkpoint:
    """Open the weights of a model folder, under the names of `expected_tensors`."""
    from fd_dsa.models.checkpoint import Checkpoint

    packed_name = None if config.packing is None else config.packing.name_of
    return Checkpoint.open(folder, FAMILIES[config.model_type].tensor_name or packed_name)


def create_model(config: FamilyConfig, weights: Weights) -> FamilyModel:
    """Create the model of a configuration.

    Args:
        weights: HostWeights or DeviceWeights, which allocate the weights. Their `loaders` fill
            them later.
    """
    import paddle

    before = paddle.device.get_device()
    # otherwise Paddle creates tensors on its default device
    paddle.set_device("cpu")
    try:
        return FAMILIES[config.model_type].model(config, weights)
    finally:
        paddle.set_device(before)
