"""What the installed FastDeploy has and how it is called; nothing is changed here.

Trees are told apart by what they have, never by a version: names, parameter lists, and the shapes
that the DSA backend gives its caches. What does not fit is an UnsupportedTree with its reason.

Source: FastDeploy's `model_executor/layers/attention/` (`dsa_attention_backend.py`,
`base_attention_backend.py`, `attention_selecter.py`), `model_executor/models/deepseek_v3.py` and
`platforms/base.py`, of March to May 2026 (#6689, #7367, #7598).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from fd_dsa.attention import CacheLayout

ATTENTION = "fastdeploy.model_executor.layers.attention"
MODELS = "fastdeploy.model_executor.models.deepseek_v3"
RUNNER = "fastdeploy.worker.gpu_model_runner"
_BACKEND_FILE = f"{ATTENTION}.dsa_attention_backend"
_OPERATORS = "fastdeploy.model_executor.ops.gpu"

_CONSTRUCTOR = (
    "fd_config",
    "kv_num_heads",
    "num_heads",
    "head_dim",
    "encoder_block_shape_q",
    "decoder_block_shape_q",
)
_FORWARD = ("q", "k", "v", "qkv", "compressed_kv", "k_pe", "layer", "forward_meta")
# what the shapes of caches follow from
_SIZES = {
    "block_size": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "quant_block_size": 128,
}
_LAYER = ("fd_config", "layer_id", "prefix")

LAYER_PARTS = {
    "Indexer": ("index_head_dim", "index_n_heads", "wq_b", "wk", "weights_proj", "k_norm"),
    "DeepseekV32DSAAttention": (
        "num_attention_heads_tp",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_head_dim",
        "v_head_dim",
        "qkv_a_proj_with_mqa",
        "q_a_layernorm",
        "kv_a_layernorm",
        "q_b_proj",
        "kv_b_proj_bmm",
        "o_proj",
        "rotary_emb",
        "indexer_rotary_emb",
        "indexer",
        "dsa_attn",
    ),
}
"""Attributes of FastDeploy's layers that ours read."""

CALLED = (
    ("layers.linear", "KVBatchLinear", ("x", "proj_type")),
    (
        "layers.attention.attention",
        "Attention",
        ("q", "k", "v", "qkv", "compressed_kv", "k_pe", "forward_meta"),
    ),
)
"""Module, class and parameters of `forward` of what ours call."""


class UnsupportedTree(Exception):
    """The installed FastDeploy lacks something, or has it in another form; the text says what."""


@dataclass(frozen=True, slots=True)
class TreeFeatures:
    """The variants of one FastDeploy tree that make a difference to us.

    Attributes:
        version: what the package calls itself; for logs alone.
        has_backend: its own DSA backend can be imported, so that ours derives from it.
        position_dtype: of `forward_meta.position_ids`: "int32", or "int64" with the fused operator.
        model_makes_positions: the model's `pre_process` makes positions, after the backend.
    """

    version: str
    has_backend: bool
    position_dtype: str
    model_makes_positions: bool

    def summary(self) -> str:
        """The features as words for the log."""
        base = "derived from" if self.has_backend else "in place of"
        maker = "model" if self.model_makes_positions else "runner"
        return (
            f"FastDeploy {self.version}, {base} its DSA backend, {self.position_dtype} positions "
            f"as its {maker} makes them"
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """The objects of an imported FastDeploy that ours derive from or stand in for.

    Attributes:
        attention: the package `model_executor.layers.attention`.
        backend_base: class that our backend derives from.
        backend_file: the module of FastDeploy's own backend, None where it was not imported.
        select: `_get_attn_backend`, whose answers are cached.
        models: the module of DeepSeek-V3.2 and GLM-5.
        layer_norm: FastDeploy's LayerNorm.
        features: the variants.
    """

    attention: ModuleType
    backend_base: type
    backend_file: ModuleType | None
    select: Callable[[str], type]
    models: ModuleType
    layer_norm: type
    features: TreeFeatures


def import_models() -> ModuleType:
    """The module of DeepSeek-V3.2, imported; FastDeploy runs its plug-ins when that is done.

    Raises:
        UnsupportedTree: there is no such module, or its import fails.
    """
    return _imported(MODELS)


def examine() -> Tree:
    """What the installed tree has for us.

    Raises:
        UnsupportedTree: a name is missing, or takes other arguments or gives other cache shapes.
    """
    attention, models = _imported(ATTENTION), import_models()
    base, backend_file = _backend_base(attention)
    selection = _imported(f"{ATTENTION}.attention_selecter")
    _check_selection()
    _check_models(models)
    layer_norm = _attribute(
        _imported("fastdeploy.model_executor.layers.normalization"), "LayerNorm"
    )
    _check_accepts(layer_norm, ("fd_config", "hidden_size", "eps", "prefix", "with_bias"))
    features = TreeFeatures(
        version=str(getattr(_imported("fastdeploy"), "__version__", None) or "of unknown version"),
        has_backend=backend_file is not None,
        position_dtype=_position_dtype(),
        model_makes_positions=hasattr(models.DeepseekV3ForCausalLM, "pre_process"),
    )
    return Tree(
        attention,
        base,
        backend_file,
        _attribute(selection, "_get_attn_backend"),
        models,
        layer_norm,
        features,
    )


def _backend_base(attention: ModuleType) -> tuple[type, ModuleType | None]:
    """The class to derive from, and the module of FastDeploy's own backend.

    Where the file of the backend is there and cannot be imported (no FlashMLA, no operators), the
    abstract base serves: ours needs nothing of it.
    """
    own = getattr(attention, "DSAAttentionBackend", None)
    if own is not None:
        _check_backend(own)
        return own, sys.modules.get(own.__module__)
    if not _exists(_BACKEND_FILE):
        raise UnsupportedTree("no DSAAttentionBackend in layers/attention: a tree before #6689")
    base = _attribute(_imported(f"{ATTENTION}.base_attention_backend"), "AttentionBackend")
    _check_parameters(base.forward, _FORWARD, "AttentionBackend.forward")
    return base, None


def _check_backend(own: Any) -> None:
    """Refuse a DSA backend that is called otherwise, or whose caches look otherwise."""
    name = "DSAAttentionBackend"
    _check_parameters(_attribute(own, "__init__", name), _CONSTRUCTOR, f"{name}.__init__")
    for method, parameters in (
        ("forward_mixed", _FORWARD),
        ("forward", _FORWARD),
        ("init_attention_metadata", ("forward_meta",)),
        ("get_kv_cache_shape", ("max_num_blocks", "kv_cache_quant_type")),
    ):
        _check_parameters(_attribute(own, method, name), parameters, f"{name}.{method}")
    expected = cache_shapes(CacheLayout("fp8_ds_mla", 64, 512, 64, 128), 2)
    try:
        # not constructed: the constructor allocates on the device
        probe = own.__new__(own)
        vars(probe).update(_SIZES)
        found = probe.get_kv_cache_shape(max_num_blocks=2, kv_cache_quant_type="uint8")
    except Exception as error:
        raise UnsupportedTree(f"{name}.get_kv_cache_shape fails with {error!r}") from None
    if not isinstance(found, tuple) or [list(one) for one in found] != list(expected):
        raise UnsupportedTree(
            f"{name}.get_kv_cache_shape gives {found!r} for 2 blocks, known is {expected!r}"
        )


def cache_shapes(layout: CacheLayout, num_blocks: int) -> tuple[list[int], list[int], list[int]]:
    """Shapes of the key (latent), value (empty) and indexer cache of a layer."""
    return layout.latent_shape(num_blocks), [], layout.indexer_shape(num_blocks)


def _check_selection() -> None:
    """Refuse a tree whose list of backends has no DSA_ATTN."""
    members = _attribute(_imported("fastdeploy.platforms.base"), "_Backend")
    if "DSA_ATTN" not in getattr(members, "__members__", {}):
        raise UnsupportedTree("platforms/base.py: _Backend has no DSA_ATTN")


def _check_models(models: ModuleType) -> None:
    """Refuse models whose layers are not put together and called as ours are."""
    for name, forward in (
        ("Indexer", ("forward_meta", "hidden_states", "qr", "rotary_emb")),
        ("DeepseekV32DSAAttention", ("forward_meta", "hidden_states")),
    ):
        layer = _attribute(models, name, "models/deepseek_v3.py")
        _check_parameters(layer.__init__, _LAYER, f"{name}.__init__")
        _check_parameters(layer.forward, forward, f"{name}.forward")
        _check_parts(layer, LAYER_PARTS[name])
    for module, name, parameters in CALLED:
        called = _attribute(_imported(f"fastdeploy.model_executor.{module}"), name)
        _check_parameters(called.forward, parameters, f"{name}.forward")
    model = _attribute(models, "DeepseekV3ForCausalLM", "models/deepseek_v3.py")
    if hasattr(model, "pre_process"):
        _check_parameters(model.pre_process, ("forward_meta",), f"{model.__name__}.pre_process")


def _position_dtype() -> str:
    """Dtype of the tree's positions: the fused operator of later trees makes int64."""
    try:
        operators = import_module(_OPERATORS)
    except Exception:
        return "int32"
    fused = getattr(operators, "get_position_ids_and_slot_mapping", None)
    return "int32" if fused is None else "int64"


def _imported(name: str) -> ModuleType:
    """A module of FastDeploy.

    Raises:
        UnsupportedTree: it is not there, or its import fails.
    """
    try:
        return import_module(name)
    except Exception as error:
        raise UnsupportedTree(f"{name} cannot be imported: {error!r}") from None


def _exists(name: str) -> bool:
    """Whether a module could be imported, as far as its file goes."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _attribute(owner: Any, name: str, where: str = "") -> Any:
    """`owner.name`, which must be there."""
    found = getattr(owner, name, None)
    if found is None:
        raise UnsupportedTree(f"{where or owner.__name__} has no {name}")
    return found


def _check_parameters(function: Any, expected: tuple[str, ...], where: str) -> None:
    """Refuse a method whose parameters after `self` are others than these."""
    found = tuple(inspect.signature(function).parameters)[1:]
    if found != expected:
        raise UnsupportedTree(
            f"{where} takes ({', '.join(found)}), known is ({', '.join(expected)})"
        )


def _check_parts(layer: type, parts: tuple[str, ...]) -> None:
    """Refuse a layer whose methods name none of these attributes: it has others in their place."""
    named: set[str] = set()
    for owner in layer.__mro__:
        for method in vars(owner).values():
            code = getattr(inspect.unwrap(method) if callable(method) else method, "__code__", None)
            if code is not None:
                named.update(code.co_names)
    missing = [part for part in parts if part not in named]
    if missing:
        raise UnsupportedTree(f"{layer.__name__} has no {', '.join(missing)}")


def _check_accepts(layer: Any, keywords: tuple[str, ...]) -> None:
    """Refuse a class whose constructor lacks one of these keywords."""
    missing = [one for one in keywords if one not in inspect.signature(layer).parameters]
    if missing:
        raise UnsupportedTree(f"{layer.__name__} takes no {', '.join(missing)}")
