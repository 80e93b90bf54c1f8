"""What is looked for in a FastDeploy tree: one table of checks, each with its reason.

What a tree has decides, never its version: names, parameter lists, and the shapes that the DSA
backend gives its caches. What does not fit is an UnsupportedTree with its reason.
Classes of ours that are bound already are looked through: what counts is FastDeploy's own.

Source: FastDeploy's `model_executor/layers/attention/` (`dsa_attention_backend.py`,
`base_attention_backend.py`, `attention_selecter.py`), `model_executor/models/deepseek_v3.py`,
`model_executor/forward_meta.py`, `worker/gpu_model_runner.py` and `platforms/base.py`, of March to
June 2026 (#6689, #7367, #7598, #8041).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from fd_dsa.attention import CacheLayout

ATTENTION = "fastdeploy.model_executor.layers.attention"
MODELS = "fastdeploy.model_executor.models.deepseek_v3"
RUNNER = "fastdeploy.worker.gpu_model_runner"
MARK = "__fd_dsa__"
"""Attribute of every class of ours that is bound to a name of FastDeploy's."""

_BACKEND_FILE = f"{ATTENTION}.dsa_attention_backend"

_FORWARD = "q k v qkv compressed_kv k_pe layer forward_meta"
_BACKEND_METHODS = {
    "__init__": (
        "fd_config kv_num_heads num_heads head_dim encoder_block_shape_q decoder_block_shape_q"
    ),
    "forward_mixed": _FORWARD,
    "forward": _FORWARD,
    "init_attention_metadata": "forward_meta",
    "get_kv_cache_shape": "max_num_blocks kv_cache_quant_type",
}
_LAYOUT = CacheLayout("fp8_ds_mla", 64, 512, 64, 128)
_LAYER = "fd_config layer_id prefix"


@dataclass(frozen=True, slots=True)
class Known:
    """A class of FastDeploy as ours meet it.

    Attributes:
        module: below `fastdeploy.model_executor`.
        name: of the class.
        parts: attributes that ours read, with spaces.
        methods: name -> parameters after `self`, with spaces.
    """

    module: str
    name: str
    parts: str = ""
    methods: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Path of the module, as reasons name it."""
        return f"{self.module.replace('.', '/')}.py"

    def check(self) -> None:
        """Refuse a class that is missing, is called otherwise or has other parts."""
        module = imported(f"fastdeploy.model_executor.{self.module}")
        found = attribute(module, self.name, self.file)
        _check_methods(found, self.name, self.methods)
        _check_parts(found, self.parts)


KNOWN = (
    Known(
        "models.deepseek_v3",
        "Indexer",
        "index_head_dim index_n_heads wq_b wk weights_proj k_norm",
        {"__init__": _LAYER, "forward": "forward_meta hidden_states qr rotary_emb"},
    ),
    Known(
        "models.deepseek_v3",
        "DeepseekV32DSAAttention",
        "num_attention_heads_tp q_lora_rank kv_lora_rank qk_nope_head_dim qk_head_dim v_head_dim "
        "qkv_a_proj_with_mqa q_a_layernorm kv_a_layernorm q_b_proj kv_b_proj_bmm o_proj "
        "rotary_emb indexer_rotary_emb indexer dsa_attn",
        {"__init__": _LAYER, "forward": "forward_meta hidden_states"},
    ),
    Known("layers.normalization", "RMSNorm", "weight eps"),
    Known("layers.normalization", "LayerNorm", "weight bias"),
    Known("layers.rotary_embedding", "DeepseekScalingRotaryEmbedding", "cos_sin_cache"),
    Known("layers.linear", "KVBatchLinear", "", {"forward": "x proj_type"}),
    Known(
        "layers.attention.attention",
        "Attention",
        "",
        {"forward": "q k v qkv compressed_kv k_pe forward_meta"},
    ),
)
"""The layers that ours derive from or call."""

FORWARD_META = ("ids_remove_padding", "attn_backend", "seq_lens_encoder", "seq_lens_decoder")
FORWARD_META += ("seq_lens_this_time", "block_tables", "caches", "max_len_tensor_cpu")
"""Fields of FastDeploy's ForwardMeta that ours read and the runner fills."""

RUNNER_METHODS = (
    "initialize_forward_meta",
    "_initialize_attn_backend",
    "_compute_position_ids_and_slot_mapping",
    "initialize_kv_cache",
)
"""Methods of FastDeploy's runner that our hooks go before."""


class UnsupportedTree(Exception):
    """The installed FastDeploy lacks something, or has it in another form; the text says what."""


class NotExamined(Exception):
    """This process cannot import what a check looks at; the text says why."""


def checks() -> list[dict[str, Any]]:
    """Every check of the table, each by itself, for a report.

    Returns:
        for each check its `name`, `passed` (None = not examined in this process) and `reason`
        ("" = passed).
    """
    found = []
    for name, check in CHECKS.items():
        passed: bool | None = True
        reason = ""
        try:
            check()
        except NotExamined as error:
            passed, reason = None, f"not examined here: {error}"
        except Exception as error:
            passed, reason = False, describe(error)
        found.append({"name": name, "passed": passed, "reason": reason})
    return found


def examine() -> None:
    """Run every check but that of the runner, which a worker's process alone can import.

    Raises:
        UnsupportedTree: what the first one that fails has found.
    """
    for check in CHECKS.values():
        if check is not _check_installed_runner:
            check()


def describe(error: BaseException) -> str:
    """An error in one line; its type is named unless it is our own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UnsupportedTree) else f"{type(error).__name__}: {text}"


def backend_base() -> tuple[type, ModuleType | None]:
    """The class to derive from, and the module of FastDeploy's own backend.

    Where the file of the backend is there and cannot be imported (no FlashMLA, no operators), the
    abstract base serves: ours needs nothing of it.
    """
    own = _upstream(getattr(imported(ATTENTION), "DSAAttentionBackend", None))
    if own is not None and own.__name__ != "AttentionBackend":
        _check_backend(own)
        return own, sys.modules.get(own.__module__)
    if find_spec(_BACKEND_FILE) is None:
        raise UnsupportedTree("no DSAAttentionBackend in layers/attention: a tree before #6689")
    base = attribute(imported(f"{ATTENTION}.base_attention_backend"), "AttentionBackend")
    _check_methods(base, "AttentionBackend", {"forward": _FORWARD})
    return base, None


def _check_backend(own: Any) -> None:
    """Refuse a DSA backend that is called otherwise, or whose caches look otherwise."""
    name = "DSAAttentionBackend"
    _check_methods(own, name, _BACKEND_METHODS)
    expected = cache_shapes(_LAYOUT, 2)
    try:
        # not constructed: the constructor allocates on the device
        probe = own.__new__(own)
        vars(probe).update(asdict(_LAYOUT), quant_block_size=128)
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
    members = attribute(imported("fastdeploy.platforms.base"), "_Backend")
    if "DSA_ATTN" not in getattr(members, "__members__", {}):
        raise UnsupportedTree("platforms/base.py: _Backend has no DSA_ATTN")


def _check_model() -> None:
    """Refuse a model that makes positions itself, in every step after the backend has."""
    model = attribute(imported(MODELS), "DeepseekV3ForCausalLM", "models/deepseek_v3.py")
    if hasattr(model, "pre_process"):
        raise UnsupportedTree(f"{model.__name__} has a pre_process: a tree before #7367")


def _check_forward_meta() -> None:
    """Refuse a ForwardMeta without a field that ours read; some trees answer None for any name."""
    meta = attribute(imported("fastdeploy.model_executor.forward_meta"), "ForwardMeta")
    fields = {name for owner in meta.__mro__ for name in inspect.get_annotations(owner)}
    _refuse_missing(meta, [name for name in FORWARD_META if name not in fields])


def select() -> Callable[[str], type]:
    """FastDeploy's function from the name of a backend to its class."""
    return attribute(imported(f"{ATTENTION}.attention_selecter"), "_get_attn_backend")


def _check_installed_runner() -> None:
    """The methods of the runner's class, where this process can import it."""
    try:
        runner = import_module(RUNNER)
    except Exception as error:
        raise NotExamined(f"{RUNNER} cannot be imported: {error!r}") from None
    check_runner(attribute(runner, "GPUModelRunner"))


def check_runner(runner: type) -> None:
    """Refuse a runner that lacks a method our hooks go before."""
    _refuse_missing(runner, [name for name in RUNNER_METHODS if not hasattr(runner, name)])


def imported(name: str) -> ModuleType:
    """A module of FastDeploy; UnsupportedTree where it is not there, or its import fails."""
    try:
        return import_module(name)
    except Exception as error:
        raise UnsupportedTree(f"{name} cannot be imported: {error!r}") from None


def attribute(owner: Any, name: str, where: str = "") -> Any:
    """FastDeploy's own `owner.name`, which must be there."""
    found = getattr(owner, name, None)
    if found is None:
        raise UnsupportedTree(f"{where or owner.__name__} has no {name}")
    return _upstream(found)


def _upstream(thing: Any) -> Any:
    """FastDeploy's class, where ours is bound to its name and derives from it."""
    return thing.__bases__[-1] if hasattr(thing, MARK) else thing


def _refuse_missing(owner: type, missing: list[str]) -> None:
    if missing:
        raise UnsupportedTree(f"{owner.__name__} has no {', '.join(missing)}")


def _check_methods(owner: Any, name: str, methods: Mapping[str, str]) -> None:
    """Refuse a class one of whose methods takes other parameters after `self`."""
    for method, expected in methods.items():
        function = attribute(owner, method, name)
        found, known = list(inspect.signature(function).parameters)[1:], expected.split()
        if found != known:
            raise UnsupportedTree(
                f"{name}.{method} takes ({', '.join(found)}), known is ({', '.join(known)})"
            )


def _check_parts(layer: type, parts: str) -> None:
    """Refuse a layer whose methods name none of these attributes: it has others in their place."""
    named: set[str] = set()
    for owner in layer.__mro__:
        for method in vars(owner).values():
            code = getattr(inspect.unwrap(method) if callable(method) else method, "__code__", None)
            if code is not None:
                named.update(code.co_names)
    _refuse_missing(layer, [part for part in parts.split() if part not in named])


CHECKS: dict[str, Callable[[], Any]] = {
    "layers/attention": lambda: imported(ATTENTION),
    "models/deepseek_v3.py": lambda: imported(MODELS),
    "layers/attention: DSAAttentionBackend": backend_base,
    "platforms/base.py: _Backend": _check_selection,
    **{f"{known.file}: {known.name}": known.check for known in KNOWN},
    "models/deepseek_v3.py: DeepseekV3ForCausalLM": _check_model,
    "layers/attention/attention_selecter.py: _get_attn_backend": select,
    "forward_meta.py: ForwardMeta": _check_forward_meta,
    "worker/gpu_model_runner.py: GPUModelRunner": _check_installed_runner,
}
"""Where something is looked for in a tree, and what -> what raises UnsupportedTree without it.

`examine` raises the first failure in this order.
"""
