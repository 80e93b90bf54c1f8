"""Checks of a FastDeploy tree: one table, each check with its reason.

A tree's contents decide, never its version. A check that fails is an UnsupportedTree. The worker
runs every check before it replaces anything, and so does the doctor.

A method that the plug-in calls, or that FastDeploy calls on a class of ours, must accept the
arguments of that call (`inspect.signature(...).bind`), so a new optional parameter is no obstacle.
Bound classes of ours are looked through, because FastDeploy's own count.

Source: FastDeploy's `model_executor/layers/attention/` (`dsa_attention_backend.py`,
`attention_selecter.py`), `model_executor/models/` (`deepseek_v3.py`, `model_base.py`),
`model_executor/forward_meta.py`, `worker/gpu_model_runner.py`, `plugins/utils.py` and
`platforms/base.py`, of March to June 2026 (#6689, #7367, #7598, #7787, #8041, #8060).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from types import CodeType, ModuleType
from typing import Any

from fd_dsa.cache_formats import CacheLayout
from fd_dsa.models.registry import FAMILIES

ATTENTION = "fastdeploy.model_executor.layers.attention"
MODELS = "fastdeploy.model_executor.models.deepseek_v3"
REGISTRY = "fastdeploy.model_executor.models.model_base"
RUNNER = "fastdeploy.worker.gpu_model_runner"
RUNNER_GROUP = "fastdeploy.model_runner_plugins"
V1_CACHES = "ENABLE_V1_KVCACHE_MANAGER"
"""FastDeploy's variable for its V1 cache manager (#7787)."""
MARK = "__fd_dsa__"
"""Attribute of every class of ours that FastDeploy uses."""
ARCHITECTURES = tuple(one.fastdeploy_class for one in FAMILIES.values() if one.fastdeploy_class)
"""Models whose layers are replaced; a tree must have the first."""

_LAYOUT = CacheLayout("fp8_ds_mla", 64, 512, 64, 128)


class UnsupportedTree(Exception):
    """The installed FastDeploy lacks something, or has it in another form; the text says what."""


@dataclass(frozen=True, slots=True)
class Known:
    """A class of FastDeploy and the plug-in's use of it.

    Attributes:
        module: name below `fastdeploy`.
        name: name of the class.
        parts: attributes that the plug-in reads, with spaces; the code of the class names each.
        calls: method -> arguments of its call after `self`, with spaces; a keyword ends with `=`.
    """

    module: str
    name: str
    parts: str = ""
    calls: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """File and class, as reports name them."""
        return f"{self.module.removeprefix('model_executor.').replace('.', '/')}.py: {self.name}"

    def find(self) -> Any:
        """FastDeploy's own class."""
        where = self.label.partition(":")[0]
        return attribute(imported(f"fastdeploy.{self.module}"), self.name, where)

    def check(self) -> None:
        """Refuse a class that is missing, takes other calls or has other parts."""
        found = self.find()
        for method, arguments in self.calls.items():
            check_call(attribute(found, method, self.name), f"{self.name}.{method}", arguments)
        functions = (value for owner in found.__mro__ for value in vars(owner).values())
        codes = (getattr(inspect.unwrap(one), "__code__", None) for one in functions)
        words = {word for code in codes if code for word in code.co_names}
        _refuse_missing(found, (part for part in self.parts.split() if part not in words))


BACKEND = Known(
    "model_executor.layers.attention.dsa_attention_backend",
    "DSAAttentionBackend",
    "block_size max_seq_len num_heads num_layers num_layers_draft_model start_layer_index "
    "attn_softmax_scale pd_disaggregation_mode keep_pd_step_flag rank device_id",
    {
        "__init__": "fd_config kv_num_heads= num_heads= head_dim= encoder_block_shape_q= "
        "decoder_block_shape_q=",
        "init_attention_metadata": "forward_meta",
        "get_attention_meta": "",
        "get_kv_cache_shape": "max_num_blocks= kv_cache_quant_type=",
    },
)
KNOWN = (
    BACKEND,
    Known(
        "model_executor.models.deepseek_v3",
        "Indexer",
        "index_head_dim index_n_heads wq_b wk weights_proj k_norm",
    ),
    Known(
        "model_executor.models.deepseek_v3",
        "DeepseekV32DSAAttention",
        "num_attention_heads_tp q_lora_rank kv_lora_rank qk_nope_head_dim qk_head_dim v_head_dim "
        "qkv_a_proj_with_mqa q_a_layernorm kv_a_layernorm q_b_proj kv_b_proj_bmm o_proj "
        "rotary_emb indexer_rotary_emb indexer",
        {"forward": "forward_meta hidden_states"},
    ),
    Known("model_executor.layers.normalization", "RMSNorm", "weight eps", {"forward": "x"}),
    Known("model_executor.layers.normalization", "LayerNorm", "weight bias"),
    Known(
        "model_executor.layers.rotary_embedding", "DeepseekScalingRotaryEmbedding", "cos_sin_cache"
    ),
    Known("model_executor.layers.linear", "KVBatchLinear", "", {"forward": "x proj_type="}),
    Known(
        "model_executor.models.model_base",
        "ModelRegistry",
        "",
        {
            "register_model_class": "architecture= module_name= module_path=",
            "get_class": "name",
        },
    ),
)
"""Classes that ours derive from or call."""

FORWARD_META: tuple[str, ...] = (
    "ids_remove_padding",
    "attn_backend",
    "seq_lens_encoder",
    "seq_lens_decoder",
)
FORWARD_META += ("seq_lens_this_time", "block_tables", "caches", "max_len_tensor_cpu")
"""Fields of FastDeploy's ForwardMeta that ours read and the runner fills."""

RUNNER_METHODS = {
    "initialize_forward_meta": "forward_meta attn_backends",
    "_initialize_attn_backend": "attn_backends",
    "_compute_position_ids_and_slot_mapping": "position_ids_buffer",
    # the only source of the dtype of V0's caches, which ours replaces meanwhile
    "initialize_kv_cache": "caches model_config dtype",
    "clear_cache": "",
    "_dummy_run": "",
    "update_parameters": "",
    "update_weights": "",
    "wakeup": "",
}
"""Methods of FastDeploy's runner that ours override -> names that their code must read."""


def checks() -> list[dict[str, Any]]:
    """Results of all checks, each by itself, for a report.

    Returns:
        for each check its `name`, `passed` and `reason` ("" = passed).
    """
    found = []
    for name, check in CHECKS.items():
        reason = ""
        try:
            check()
        except Exception as error:
            reason = describe(error)
        found.append({"name": name, "passed": not reason, "reason": reason})
    return found


def examine() -> None:
    """Run every check.

    Raises:
        UnsupportedTree: the first check that fails, with its reason.
    """
    for check in CHECKS.values():
        check()


def describe(error: BaseException) -> str:
    """An error in one line; its type is named unless it is our own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UnsupportedTree) else f"{type(error).__name__}: {text}"


def check_call(function: Callable[..., object], name: str, arguments: str) -> None:
    """Refuse a method that does not accept a call.

    Args:
        function: a method of a class; `self` is added unless it is a class method.
        arguments: as in `Known.calls`.
    """
    words = ([] if inspect.ismethod(function) else ["self"]) + arguments.split()
    keywords = {word[:-1]: None for word in words if word.endswith("=")}
    signature = inspect.signature(function)
    try:
        signature.bind(*(word for word in words if not word.endswith("=")), **keywords)
    except TypeError as error:
        raise UnsupportedTree(
            f"{name}{signature} does not accept ({', '.join(arguments.split())}): {error}"
        ) from None


def check_runner_plugins() -> None:
    """Refuse several runner classes: FastDeploy then takes its own, without a word."""
    allowed = imported("fastdeploy.envs").FD_PLUGINS
    names = {point.name for point in entry_points(group=RUNNER_GROUP)}
    names = names if allowed is None else names & set(allowed)
    if len(names) > 1:
        raise UnsupportedTree(
            f"{RUNNER_GROUP}: got {', '.join(sorted(names))}; FastDeploy takes one runner class, "
            "and fd_dsa needs its own; name fd_dsa alone in FD_PLUGINS"
        )


def _check_cache_shapes() -> None:
    """Refuse a DSA backend whose caches have another layout."""
    own, no_scales = BACKEND.find(), list[int]()
    expected = _LAYOUT.latent_shape(2), no_scales, _LAYOUT.indexer_shape(2)
    try:
        # not constructed: the constructor allocates on the device
        probe = own.__new__(own)
        vars(probe).update(asdict(_LAYOUT), quant_block_size=128)
        found = probe.get_kv_cache_shape(max_num_blocks=2, kv_cache_quant_type="uint8")
    except Exception as error:
        raise UnsupportedTree(f"get_kv_cache_shape fails with {error!r}") from None
    if not isinstance(found, tuple) or [list(one) for one in found] != list(expected):
        raise UnsupportedTree(
            f"get_kv_cache_shape gives {found!r} for 2 blocks, known is {expected!r}"
        )


def _check_create_kv_cache() -> None:
    """Refuse V1's cache manager if the backend does not accept its call of create_kv_cache."""
    if not getattr(imported("fastdeploy.envs"), V1_CACHES, False):
        return
    create = getattr(BACKEND.find(), "create_kv_cache", None)
    if create is None:
        raise UnsupportedTree(
            f"{V1_CACHES} is set, and DSAAttentionBackend has no create_kv_cache (a tree before "
            "#7787); unset the variable"
        )
    controller = attribute(imported("fastdeploy.cache_manager.v1"), "CacheController")
    source = inspect.getsource(attribute(controller, "initialize_kv_cache"))
    for call in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "create_kv_cache":
            words = [*(["x"] * len(call.args)), *(f"{one.arg}=" for one in call.keywords)]
            check_call(create, "create_kv_cache", " ".join(words))


def _check_selection() -> None:
    """Refuse a tree whose list of backends has no DSA_ATTN."""
    members = attribute(imported("fastdeploy.platforms.base"), "_Backend")
    if "DSA_ATTN" not in getattr(members, "__members__", {}):
        raise UnsupportedTree("platforms/base.py: _Backend has no DSA_ATTN")


def models() -> dict[str, Any]:
    """FastDeploy's own classes by architecture, those of `ARCHITECTURES` that it has registered."""
    registry, found = attribute(imported(REGISTRY), "ModelRegistry"), {}
    for name in ARCHITECTURES:
        try:
            found[name] = _upstream(registry.get_class(name))
        except ValueError as error:
            if name == ARCHITECTURES[0]:
                raise UnsupportedTree(str(error)) from None
    return found


def _check_models() -> None:
    """Refuse a model that makes positions itself, in every step after the backend has."""
    imported(MODELS)
    for name, model in models().items():
        check_call(model.__init__, f"{name}.__init__", "fd_config")
        if hasattr(model, "pre_process"):
            raise UnsupportedTree(f"{name} has a pre_process: a tree before #7367")


def _check_forward_meta() -> None:
    """Refuse a ForwardMeta without a field that ours read; some trees answer None for any name."""
    meta = attribute(imported("fastdeploy.model_executor.forward_meta"), "ForwardMeta")
    fields = {name for owner in meta.__mro__ for name in inspect.get_annotations(owner)}
    _refuse_missing(meta, (name for name in FORWARD_META if name not in fields))


def select() -> Callable[[str], type]:
    """FastDeploy's function from the name of a backend to its class."""
    found = attribute(imported(f"{ATTENTION}.attention_selecter"), "_get_attn_backend")
    return found


def _check_runner() -> None:
    """Refuse a runner without a method that ours override, or with another one of that name."""
    runner = attribute(imported(RUNNER), "GPUModelRunner")
    _refuse_missing(runner, (name for name in RUNNER_METHODS if not hasattr(runner, name)))
    for method, needed in RUNNER_METHODS.items():
        missing = [word for word in needed.split() if word not in words_of(runner, method)]
        if missing:
            raise UnsupportedTree(f"GPUModelRunner.{method} does not read {', '.join(missing)}")


def imported(name: str) -> ModuleType:
    """A module of FastDeploy; UnsupportedTree if it is missing or its import fails."""
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


def words_of(owner: type, method: str) -> set[str]:
    """Names and strings in the code of a method, and of the methods of its class that it names."""
    found: set[str] = set()
    pending: list[Any] = [getattr(owner, method)]
    while pending:
        code = getattr(inspect.unwrap(pending.pop()), "__code__", None)
        new = (_words(code) if code else set()) - found
        found |= new
        pending += filter(callable, (getattr(owner, name, None) for name in new))
    return found


def _words(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for value in code.co_consts:
        found |= {value} if isinstance(value, str) else set()
        found |= _words(value) if isinstance(value, CodeType) else set()
    return found


def _upstream(thing: Any) -> Any:
    """FastDeploy's class, also if ours is bound to its name and derives from it."""
    return thing.__bases__[-1] if hasattr(thing, MARK) else thing


def _refuse_missing(owner: type, names: Iterable[str]) -> None:
    missing = ", ".join(names)
    if missing:
        raise UnsupportedTree(f"{owner.__name__} has no {missing}")


CHECKS: dict[str, Callable[[], Any]] = {
    "plugins: runner class": check_runner_plugins,
    **{known.label: known.check for known in KNOWN},
    "layers/attention/dsa_attention_backend.py: get_kv_cache_shape": _check_cache_shapes,
    "layers/attention/dsa_attention_backend.py: create_kv_cache": _check_create_kv_cache,
    "layers/attention/dsa_attention_backend.py: DSAAttentionMetadata": lambda: attribute(
        imported(f"{ATTENTION}.dsa_attention_backend"), "DSAAttentionMetadata"
    ),
    "layers/attention/attention_selecter.py: _get_attn_backend": select,
    "platforms/base.py: _Backend": _check_selection,
    f"models/deepseek_v3.py: {ARCHITECTURES[0]}": _check_models,
    "forward_meta.py: ForwardMeta": _check_forward_meta,
    "worker/gpu_model_runner.py: GPUModelRunner": _check_runner,
}
"""Place in a tree and what is looked for -> check, in the order of `examine`."""
