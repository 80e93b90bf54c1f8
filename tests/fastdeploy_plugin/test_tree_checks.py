"""The checks of a tree: what is refused with its reason, and what is accepted."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.fastdeploy_plugin import model_runner
from fd_dsa.fastdeploy_plugin.take_over import is_ours
from fd_dsa.fastdeploy_plugin.tree_checks import (
    CHECKS,
    FORWARD_META,
    KNOWN,
    RUNNER_METHODS,
    Known,
    UnsupportedTree,
    checks,
    examine,
)
from tests.fakes.driver import Engine, Job
from tests.fakes.trees import OURS_ENV, TREES, UPSTREAM_ENV, V1_VARIABLE, installed
from tests.fastdeploy_plugin.names import (
    ATTENTION,
    MODELS,
    REGISTRY,
    RUNNER,
    changed,
    import_all,
    registered_model,
    snapshot,
)

ROOT = Path(__file__).parents[2]
BACKEND_FILE = f"{ATTENTION}.dsa_attention_backend"
SELECTER = f"{ATTENTION}.attention_selecter"
LINEAR = "fastdeploy.model_executor.layers.linear"
PLATFORM = "fastdeploy.platforms.base"


@contextmanager
def imported(env: Any = UPSTREAM_ENV) -> Iterator[Any]:
    """A tree, all of it imported, that no plug-in has touched."""
    with installed(TREES["develop"], env):
        yield import_all()


def method(parameters: str) -> Callable[..., None]:
    """A method with these parameters after `self`."""
    scope: dict[str, Any] = {}
    exec(f"def method(self, {parameters}): pass", scope)
    return scope["method"]


def shapes(row: int, count: int = 3) -> Callable[..., Any]:
    """A `get_kv_cache_shape` with another row of latents, or fewer caches."""

    def get_kv_cache_shape(self: Any, max_num_blocks: int, kv_cache_quant_type: Any = None) -> Any:
        n = max_num_blocks
        return ([n, 1, 64, row], [], [n, 64, 132])[:count]

    return get_kv_cache_shape


def failing(self: Any, max_num_blocks: int, kv_cache_quant_type: Any = None) -> Any:
    """A `get_kv_cache_shape` that reads what is not there."""
    return self.not_there


BACKEND, LAYER, MODEL = "DSAAttentionBackend", "DeepseekV32DSAAttention", "DeepseekV32ForCausalLM"
NO_DSA = type("_Backend", (), {"__members__": {"MLA_ATTN": 0}})
WITHOUT_DTYPE = method("profile=False")
# module, attribute, what is there instead (None: nothing), reason
CHANGES = [
    (BACKEND_FILE, f"{BACKEND}.__init__", method("fd_config, num_heads"), "__init__(self, fd_conf"),
    (BACKEND_FILE, f"{BACKEND}.init_attention_metadata", method("forward_meta, kind"), "'kind'"),
    (BACKEND_FILE, f"{BACKEND}.get_kv_cache_shape", method("max_num_blocks"), "does not accept"),
    (BACKEND_FILE, f"{BACKEND}.get_kv_cache_shape", shapes(656, 2), "get_kv_cache_shape gives"),
    (BACKEND_FILE, f"{BACKEND}.get_kv_cache_shape", shapes(576), "get_kv_cache_shape gives ([2, 1"),
    (BACKEND_FILE, f"{BACKEND}.get_kv_cache_shape", failing, "get_kv_cache_shape fails with"),
    (BACKEND_FILE, "DSAAttentionMetadata", None, "dsa_attention_backend has no DSAAttentionMeta"),
    (MODELS, f"{LAYER}.forward", method("forward_meta, hidden, position_ids"), "'position_ids'"),
    (MODELS, f"{MODEL}.pre_process", method("meta"), "a tree before #7367"),
    (MODELS, f"{MODEL}.__init__", method("fd_config, role"), "'role'"),
    (MODELS, "Indexer", None, "models/deepseek_v3.py has no Indexer"),
    (MODELS, LAYER, None, f"models/deepseek_v3.py has no {LAYER}"),
    (REGISTRY, "ModelRegistry.register_model_class", classmethod(method("model")), "does not acc"),
    (REGISTRY, "ModelRegistry._classes", {}, f"Model '{MODEL}' is not registered"),
    (PLATFORM, "_Backend", NO_DSA, "_Backend has no DSA_ATTN"),
    # as from #8083 on, if its helpers take the place of `proj_type`
    (LINEAR, "KVBatchLinear.forward", method("x"), "KVBatchLinear.forward(self, x) does not acc"),
    (SELECTER, "_get_attn_backend", None, "attention_selecter has no _get_attn_backend"),
    (RUNNER, "GPUModelRunner.initialize_kv_cache", WITHOUT_DTYPE, "does not read caches, model_c"),
]


def change(module: str, path: str, value: Any) -> None:
    """Put another object under a name of a module, or nothing."""
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    delattr(owner, name) if value is None else setattr(owner, name, value)


def failed() -> dict[str, str]:
    """Name and reason of the checks that fail."""
    return {one["name"]: one["reason"] for one in checks() if not one["passed"]}


@pytest.mark.parametrize(
    ("module", "path", "value", "reason"), CHANGES, ids=[f"{p}: {r}" for _, p, _, r in CHANGES]
)
def test_another_form_is_refused(module: str, path: str, value: Any, reason: str) -> None:
    with imported() as theirs:
        change(module, path, value)
        with pytest.raises(UnsupportedTree) as caught:
            examine()
        assert reason in str(caught.value)
        # the doctor's table and the worker agree
        assert str(caught.value) in failed().values()
        assert model_runner() is theirs


@pytest.mark.parametrize(
    ("known", "part"),
    # `parts` are the attributes of a type of `upstream.py`, so one for each class is enough
    [pytest.param(k, k.parts[-1], id=f"{k.name}.{k.parts[-1]}") for k in KNOWN if k.parts],
)
def test_a_class_whose_part_has_another_name_is_refused(known: Known, part: str) -> None:
    """The first step would find it, by an AttributeError."""
    with imported():
        module = import_module(f"fastdeploy.{known.module}")
        source = inspect.getsource(getattr(module, known.name))
        exec(re.sub(rf"\b{part}\b", f"{part}_2", source), vars(module))
        with pytest.raises(UnsupportedTree, match=f"{known.name}.* {part}"):
            known.check()


@pytest.mark.parametrize("name", FORWARD_META)
def test_a_field_that_ours_read_must_be_there(name: str) -> None:
    with imported():
        meta = sys.modules["fastdeploy.model_executor.forward_meta"].ForwardMeta
        del meta.__annotations__[name]
        with pytest.raises(UnsupportedTree, match=f"^ForwardMeta has no {name}$"):
            examine()


@pytest.mark.parametrize("name", RUNNER_METHODS)
def test_a_method_that_ours_override_must_be_there(name: str) -> None:
    with imported() as runner:
        delattr(next(one for one in runner.__mro__ if name in vars(one)), name)
        with pytest.raises(UnsupportedTree, match=f"^GPUModelRunner has no {name}$"):
            examine()


def test_what_a_helper_reads_counts() -> None:
    """A method may leave its work to others of its class."""
    with imported() as runner:
        runner._make_caches = runner.initialize_kv_cache
        runner.initialize_kv_cache = lambda self: self._make_caches()
        examine()


def with_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with one more optional parameter, at the end."""

    @wraps(function)
    def wider(*args: Any, option: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    option = inspect.Parameter("option", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [*signature.parameters.values(), option]
    wider.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wider


def test_a_new_optional_argument_is_accepted_and_given() -> None:
    """Upstream adds one to each method that ours call or override, and then gives it."""
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 128, "num_hidden_layers": 2}
    with imported(OURS_ENV) as runner:
        backend = sys.modules[BACKEND_FILE].DSAAttentionBackend
        layer = sys.modules[MODELS].DeepseekV32DSAAttention
        overridden = [
            *((backend, name) for name in ("__init__", "init_attention_metadata")),
            *((runner, name) for name in RUNNER_METHODS),
            (layer, "forward"),
        ]
        called = [
            *((backend, name) for name in ("get_kv_cache_shape", "get_attention_meta")),
            (sys.modules[LINEAR].KVBatchLinear, "forward"),
        ]
        for owner, name in (*overridden, *called):
            setattr(owner, name, with_option(getattr(owner, name)))
        examine()
        served = import_module("fastdeploy.worker.gpu_worker").ModelRunner
        assert is_ours(served)
        ours = {
            backend: sys.modules[ATTENTION].DSAAttentionBackend,
            runner: served,
            layer: registered_model().layer_classes[layer],
        }
        for owner, name in overridden:
            setattr(ours[owner], name, partialmethod(getattr(ours[owner], name), option=1))
        (answer,) = Engine(demo_model_path(), 16, **sizes).generate([Job([7, 8, 9], 3)])
    assert len(answer) == 3


def test_parts_that_a_base_class_makes_are_found() -> None:
    """As from #8042 on, where MLA's constructor makes DSA's layers."""
    with imported():
        models = sys.modules[MODELS]
        for layer in ("Indexer", LAYER):
            setattr(models, layer, type(layer, (getattr(models, layer),), {}))
        examine()


MAY = "max_num_blocks, cache_dtype=None, kv_cache_quant_type=None"


def test_v1_caches_are_checked_by_the_call_of_the_tree_itself() -> None:
    """May's names on one side only would end the start in a TypeError."""
    with imported({**UPSTREAM_ENV, V1_VARIABLE: "1"}):
        examine()
        sys.modules[BACKEND_FILE].DSAAttentionBackend.create_kv_cache = method(MAY)
        with pytest.raises(UnsupportedTree, match=r"create_kv_cache\(self, max_num_blocks"):
            examine()
    # without the variable that manager is not there, and V0's serves
    with imported():
        sys.modules[BACKEND_FILE].DSAAttentionBackend.create_kv_cache = method(MAY)
        examine()


def test_all_checks_pass_and_change_nothing() -> None:
    """FastDeploy's own classes are looked at, where ours are in their place too."""
    for ours in (False, True):
        with imported():
            if ours:
                assert is_ours(model_runner())
            before = snapshot()
            found = checks()
            assert changed(before) == set()
        assert found == [{"name": name, "passed": True, "reason": ""} for name in CHECKS]


def test_one_check_that_fails_hides_no_other() -> None:
    with imported():
        change(BACKEND_FILE, f"{BACKEND}.get_attention_meta", method("kind"))
        change(MODELS, "Indexer", None)
        # a form that nobody has thought of
        change(LINEAR, "KVBatchLinear.forward", 3)
        found = failed()
        assert list(found) == [
            "layers/attention/dsa_attention_backend.py: DSAAttentionBackend",
            "models/deepseek_v3.py: Indexer",
            "layers/linear.py: KVBatchLinear",
        ]
        assert found["layers/linear.py: KVBatchLinear"].startswith("TypeError: 3 is not a callable")
        # the first one is what a log says
        with pytest.raises(UnsupportedTree, match="get_attention_meta"):
            examine()


def test_the_fields_are_those_that_ours_read() -> None:
    """Fields that ours set themselves, or can do without, are not looked for."""
    own = {"fd_dsa_step", "position_ids", "slot_mapping", "indexer_attn_mask_offsets"}
    read = set()
    for folder in ("fastdeploy_plugin", "attention"):
        for file in (ROOT / "fd_dsa" / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "forward_meta":
                    read.add(node.attr)
    by_name = {"block_tables", "max_len_tensor_cpu", "seq_lens_this_time", "attn_backend"}
    assert read - own | by_name == set(FORWARD_META)
