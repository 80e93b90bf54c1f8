"""Checks of a FastDeploy tree: one table, each check with its reason.

A tree's contents decide, never its version. A check that fails raises UnsupportedTree. The worker
runs every check before it replaces a class. The doctor runs them too.

A method that the plug-in calls, or that FastDeploy calls on a derived class, must accept the
arguments of that call (`inspect.signature(...).bind`). So a new optional parameter is allowed. The
checks always examine FastDeploy's own class, also after a derived class has replaced it.

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
from fd_dsa.fastdeploy_plugin import upstream
from fd_dsa.models.registry import FAMILIES

ATTENTION = "fastdeploy.model_executor.layers.attention"
MODELS = "fastdeploy.model_executor.models.deepseek_v3"
REGISTRY = "fastdeploy.model_executor.models.model_base"
RUNNER = "fastdeploy.worker.gpu_model_runner"
RUNNER_GROUP = "fastdeploy.model_runner_plugins"
V1_CACHES = "ENABLE_V1_KVCACHE_MANAGER"
"""FastDeploy's variable for its V1 cache manager (#7787)."""
MARK = "__fd_dsa__"
"""Attribute of every derived class that FastDeploy uses."""
ARCHITECTURES = tuple(one.fastdeploy_class for one in FAMILIES.values() if one.fastdeploy_class)
"""Models whose layers are replaced. A tree must have the first one."""

_LAYOUT = CacheLayout("fp8_ds_mla", 64, 512, 64, 128)


class UnsupportedTree(Exception):
    """The installed FastDeploy lacks a part, or has it in another form."""


@dataclass(frozen=True, slots=True)
class Known:
    """A class of FastDeploy and the plug-in's use of it.

    Attributes:
        module: name below `fastdeploy`.
        name: name of the class.
        reads: class of `upstream.py` whose attributes the plug-in reads.
        calls: method -> arguments of its call after `self`, with spaces; a keyword ends with `=`.
    """

    module: str
    name: str
    reads: type = object
    calls: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """Attributes that the plug-in reads, which the code of the class must name."""
        return tuple(inspect.get_annotations(self.reads))

    @property
    def label(self) -> str:
        """File and class, for reports."""
        return f"{self.module.removeprefix('model_executor.').replace('.', '/')}.py: {self.name}"

    def find(self) -> Any:
        """Return FastDeploy's own class."""
        where = self.label.partition(":")[0]
        return attribute(imported(f"fastdeploy.{self.module}"), self.name, where)

    def check(self) -> None:
        """Refuse a class that is missing, accepts other calls or has other parts."""
        found = self.find()
        for method, arguments in self.calls.items():
            check_call(attribute(found, method, self.name), f"{self.name}.{method}", arguments)
        functions = (value for owner in found.__mro__ for value in vars(owner).values())
        codes = (getattr(inspect.unwrap(one), "__code__", None) for one in functions)
        words = {word for code in codes if code for word in code.co_names}
        _refuse_missing(found, (part for part in self.parts if part not in words))


BACKEND = Known(
    "model_executor.layers.attention.dsa_attention_backend",
    "DSAAttentionBackend",
    upstream.AttentionBackend,
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
    Known("model_executor.models.deepseek_v3", "Indexer", upstream.Indexer),
    Known(
        "model_executor.models.deepseek_v3",
        "DeepseekV32DSAAttention",
        upstream.Attention,
        {"forward": "forward_meta hidden_states"},
    ),
    Known("model_executor.layers.normalization", "RMSNorm", upstream.RMSNorm, {"forward": "x"}),
    Known("model_executor.layers.normalization", "LayerNorm", upstream.LayerNorm),
    Known(
        "model_executor.layers.rotary_embedding",
        "DeepseekScalingRotaryEmbedding",
        upstream.RotaryEmbedding,
    ),
    Known("model_executor.layers.linear", "KVBatchLinear", calls={"forward": "x proj_type="}),
    Known(
        "model_executor.models.model_base",
        "ModelRegistry",
        calls={
            "register_model_class": "architecture= module_name= module_path=",
            "get_class": "name",
        },
    ),
)
"""Classes that the plug-in derives from or calls."""

FORWARD_META: tuple[str, ...] = (
    *("ids_remove_padding", "attn_backend", "seq_lens_encoder", "seq_lens_decoder"),
    *("seq_lens_this_time", "block_tables", "caches", "max_len_tensor_cpu"),
)
"""Fields of FastDeploy's ForwardMeta that the plug-in reads and the runner fills."""

RUNNER_METHODS = {
    "initialize_forward_meta": "forward_meta attn_backends",
    "_initialize_attn_backend": "attn_backends",
    "_compute_position_ids_and_slot_mapping": "position_ids_buffer",
    # the only source of the dtype of V0's caches, which the plug-in replaces during the call
    "initialize_kv_cache": "caches model_config dtype",
    "clear_cache": "",
    "_dummy_run": "",
    "update_parameters": "",
    "update_weights": "",
    "wakeup": "",
}
"""Overridden methods of FastDeploy's runner -> names that their code must read."""


def checks() -> list[dict[str, Any]]:
    """Run every check by itself, for a report.

    Returns:
        `name`, `passed` and `reason` ("" = passed) of each check.
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
    """Return an error in one line, with its type unless it is UnsupportedTree."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UnsupportedTree) else f"{type(error).__name__}: {text}"


def check_call(function: Callable[..., object], name: str, arguments: str) -> None:
    """Refuse a method that does not accept a call.

    Args:
        function: method of a class; `self` is added unless it is a class method.
        arguments: see `Known.calls`.
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
    """Refuse several runner classes, because FastDeploy then silently uses its own."""
    allowed = imported("fastdeploy.envs").FD_PLUGINS
    names = {point.name for point in entry_points(group=RUNNER_GROUP)}
    names = names if allowed is None else names & set(allowed)
    if len(names) > 1:
        raise UnsupportedTree(
            f"{RUNNER_GROUP}: got {', '.join(sorted(names))}; FastDeploy takes one runner class, "
            "and fd_dsa needs its own; name only fd_dsa in FD_PLUGINS"
        )


def _check_cache_shapes() -> None:
    """Refuse a DSA backend whose caches have another layout."""
    own, no_scales = BACKEND.find(), list[int]()
    expected = _LAYOUT.latent_shape(2), no_scales, _LAYOUT.indexer_shape(2)
    try:
        # without the constructor, which allocates on the device
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
    """Return FastDeploy's own classes of the registered `ARCHITECTURES`, by architecture."""
    registry, found = attribute(imported(REGISTRY), "ModelRegistry"), {}
    for name in ARCHITECTURES:
        try:
            found[name] = _upstream(registry.get_class(name))
        except ValueError as error:
            if name == ARCHITECTURES[0]:
                raise UnsupportedTree(str(error)) from None
    return found


def _check_models() -> None:
    """Refuse a model that makes positions itself, in addition to the backend."""
    imported(MODELS)
    for name, model in models().items():
        check_call(model.__init__, f"{name}.__init__", "fd_config")
        if hasattr(model, "pre_process"):
            raise UnsupportedTree(f"{name} has a pre_process: a tree before #7367")


def _check_forward_meta() -> None:
    """Refuse a ForwardMeta without a field that the plug-in reads.

    Annotations decide, because some trees return None for any attribute.
    """
    meta = attribute(imported("fastdeploy.model_executor.forward_meta"), "ForwardMeta")
    fields = {name for owner in meta.__mro__ for name in inspect.get_annotations(owner)}
    _refuse_missing(meta, (name for name in FORWARD_META if name not in fields))


def select() -> Callable[[str], type]:
    """Return FastDeploy's function from the name of a backend to its class."""
    found = attribute(imported(f"{ATTENTION}.attention_selecter"), "_get_attn_backend")
    return found


def _check_runner() -> None:
    """Refuse a runner without an overridden method, or with another method of that name."""
    runner = attribute(imported(RUNNER), "GPUModelRunner")
    _refuse_missing(runner, (name for name in RUNNER_METHODS if not hasattr(runner, name)))
    for method, needed in RUNNER_METHODS.items():
        missing = [word for word in needed.split() if word not in words_of(runner, method)]
        if missing:
            raise UnsupportedTree(f"GPUModelRunner.{method} does not read {', '.join(missing)}")


def imported(name: str) -> ModuleType:
    """Import a module of FastDeploy.

    Raises:
        UnsupportedTree: the module is missing, or its import fails.
    """
    try:
        return import_module(name)
    except Exception as error:
        raise UnsupportedTree(f"{name} cannot be imported: {error!r}") from None


def attribute(owner: Any, name: str, where: str = "") -> Any:
    """Return FastDeploy's own `owner.name`.

    Raises:
        UnsupportedTree: the attribute is missing.
    """
    found = getattr(owner, name, None)
    if found is None:
        raise UnsupportedTree(f"{where or owner.__name__} has no {name}")
    return _upstream(found)


def words_of(owner: type, method: str) -> set[str]:
    """Return names and strings in a method's code, and in the methods of its class it names."""
    found: set[str] = set()
    pending: list[Any] = [getattr(owner, method)]
    while pending:
        code = getattr(inspect.unwrap(pending.pop()), "__code__", None)
        new = (_words(code) if code else set()) - found
        found |= new
        pending += filter(callable, (getattr(owner, name, None) for name in new))
    return found


def _words(code: CodeType) -> set[str]:
    """Return the names and strings in a code object."""
    found = set(code.co_names)
    for value in code.co_consts:
        found |= {value} if isinstance(value, str) else set()
        found |= _words(value) if isinstance(value, CodeType) else set()
    return found


def _upstream(thing: Any) -> Any:
    """Return FastDeploy's class for itself or for a derived class of the plug-in."""
    return thing.__bases__[-1] if hasattr(thing, MARK) else thing


def _refuse_missing(owner: type, names: Iterable[str]) -> None:
    """Raise UnsupportedTree if there are missing names."""
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
"""Place in a tree and name of the examined part -> check, in the order of `examine`."""
