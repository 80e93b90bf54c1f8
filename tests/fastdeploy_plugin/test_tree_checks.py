"""What is looked for in a tree, and what is refused with its reason."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa.fastdeploy_plugin import register
from fd_dsa.fastdeploy_plugin.take_over import is_ours, live_backend
from fd_dsa.fastdeploy_plugin.tree_checks import (
    CHECKS,
    FORWARD_META,
    KNOWN,
    RUNNER_METHODS,
    Known,
    UnsupportedTree,
    backend_base,
    checks,
    examine,
)
from tests.fakes.trees import BROKEN, OURS_ENV, TREES, UPSTREAM_ENV, installed
from tests.fastdeploy_plugin.names import ATTENTION, MODELS, RUNNER, changed, import_all, snapshot

ROOT = Path(__file__).parents[2]
SELECTER = f"{ATTENTION}.attention_selecter"
LINEAR = "fastdeploy.model_executor.layers.linear"
PLATFORM = "fastdeploy.platforms.base"


@contextmanager
def imported(name: str = "develop") -> Iterator[None]:
    """A tree, all of it imported, that no plug-in has touched."""
    with installed({**TREES, **BROKEN}[name], UPSTREAM_ENV):
        import_all()
        yield


@pytest.mark.parametrize("name", [*TREES, "raising_import"])
def test_the_class_to_derive_from(name: str) -> None:
    """FastDeploy's own, or the abstract base where that cannot be imported."""
    with installed({**TREES, **BROKEN}[name], UPSTREAM_ENV):
        import_module(MODELS)
        examine()
        attention, (base, file) = sys.modules[ATTENTION], backend_base()
        served = name in TREES
        assert base is (attention.DSAAttentionBackend if served else attention.AttentionBackend)
        assert file is sys.modules.get(f"{ATTENTION}.dsa_attention_backend")
        assert (file is not None) is served


def another(*names: str) -> Callable[..., None]:
    """A method with these parameters after `self`."""
    scope: dict[str, Any] = {}
    exec(f"def method(self, {', '.join(names)}): pass", scope)
    return scope["method"]


def shapes(row: int, count: int = 3) -> Callable[..., Any]:
    """A `get_kv_cache_shape` with another row of latents, or fewer caches."""

    def get_kv_cache_shape(
        self: Any, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> Any:
        n = max_num_blocks
        return ([n, 1, 64, row], [], [n, 64, 132])[:count]

    return get_kv_cache_shape


def failing(self: Any, max_num_blocks: int, kv_cache_quant_type: str | None = None) -> Any:
    """A `get_kv_cache_shape` that reads what is not there."""
    return self.not_there


METHODS = ["q", "k", "v", "qkv", "compressed_kv", "k_pe", "layer", "forward_meta"]
BACKEND, LAYER = "DSAAttentionBackend", "DeepseekV32DSAAttention"
NO_DSA = type("_Backend", (), {"__members__": {"MLA_ATTN": 0}})
# module, attribute, what is there instead (None: nothing), reason
CHANGES = [
    (ATTENTION, f"{BACKEND}.__init__", another("fd_config", "num_heads"), "__init__ takes"),
    (ATTENTION, f"{BACKEND}.forward_mixed", another(*METHODS[:-1]), "forward_mixed takes"),
    (ATTENTION, f"{BACKEND}.forward", another(*METHODS, "sinks"), "forward takes"),
    (ATTENTION, f"{BACKEND}.init_attention_metadata", another("forward_meta", "kind"), "takes"),
    (ATTENTION, f"{BACKEND}.get_kv_cache_shape", another("max_num_blocks"), "_cache_shape takes"),
    (ATTENTION, f"{BACKEND}.get_kv_cache_shape", shapes(656, 2), "get_kv_cache_shape gives"),
    (ATTENTION, f"{BACKEND}.get_kv_cache_shape", shapes(576), "get_kv_cache_shape gives ([2, 1"),
    (ATTENTION, f"{BACKEND}.get_kv_cache_shape", failing, "get_kv_cache_shape fails with"),
    (MODELS, "Indexer.__init__", another("fd_config", "layer_id"), "Indexer.__init__ takes"),
    (MODELS, "Indexer.forward", another("forward_meta", "qr"), "Indexer.forward takes"),
    (MODELS, f"{LAYER}.__init__", another("fd_config", "prefix"), f"{LAYER}.__init__ takes"),
    (MODELS, f"{LAYER}.forward", another("hidden_states"), "forward takes (hidden_states)"),
    (MODELS, "DeepseekV3ForCausalLM.pre_process", another("meta"), "a tree before #7367"),
    (MODELS, "Indexer", None, "models/deepseek_v3.py has no Indexer"),
    (MODELS, LAYER, None, f"models/deepseek_v3.py has no {LAYER}"),
    (MODELS, "DeepseekV3ForCausalLM", None, "models/deepseek_v3.py has no DeepseekV3ForCausalLM"),
    (PLATFORM, "_Backend", NO_DSA, "_Backend has no DSA_ATTN"),
    # as from #8083 on, if its helpers take the place of `proj_type`
    (LINEAR, "KVBatchLinear.forward", another("x"), "KVBatchLinear.forward takes (x)"),
    (SELECTER, "", None, "attention_selecter cannot be imported"),
]


@pytest.mark.parametrize(
    ("module", "path", "value", "reason"),
    CHANGES,
    ids=[f"{path or 'module'}: {reason}" for _, path, _, reason in CHANGES],
)
def test_another_form_is_refused(module: str, path: str, value: Any, reason: str) -> None:
    with imported():
        *owners, name = path.split(".")
        owner: Any = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        if not path:
            sys.modules[module] = None  # type: ignore[assignment]
        elif value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
        with pytest.raises(UnsupportedTree) as caught:
            examine()
        assert reason in str(caught.value)
        # that is what the report says of the check that failed, and of no other
        assert set(failed().values()) == {str(caught.value)}


def failed() -> dict[str, str]:
    """Name and reason of the checks that fail."""
    return {one["name"]: one["reason"] for one in checks() if not one["passed"]}


@pytest.mark.parametrize(
    ("known", "part"),
    [
        pytest.param(one, part, id=f"{one.name}.{part}")
        for one in KNOWN
        for part in one.parts.split()
    ],
)
def test_a_layer_whose_part_has_another_name_is_refused(known: Known, part: str) -> None:
    """It would be found in the first step, by an AttributeError."""
    with imported():
        module = import_module(f"fastdeploy.model_executor.{known.module}")
        source = inspect.getsource(getattr(module, known.name))
        exec(re.sub(rf"\b{part}\b", f"{part}_2", source), vars(module))
        with pytest.raises(UnsupportedTree, match=f"{known.name} has no {part}$"):
            examine()


@pytest.mark.parametrize("name", FORWARD_META)
def test_a_field_that_ours_read_must_be_there(name: str) -> None:
    with imported():
        meta = sys.modules["fastdeploy.model_executor.forward_meta"].ForwardMeta
        del meta.__annotations__[name]
        with pytest.raises(UnsupportedTree, match=f"^ForwardMeta has no {name}$"):
            examine()


def test_parts_that_a_base_class_makes_are_found() -> None:
    """As from #8042 on, where MLA's constructor makes DSA's layers."""
    with imported():
        models = sys.modules[MODELS]
        for layer in ("Indexer", LAYER):
            setattr(models, layer, type(layer, (getattr(models, layer),), {}))
        examine()


def test_the_page_lists_what_is_looked_for() -> None:
    page = (ROOT / "docs" / "fastdeploy.md").read_text(encoding="utf-8")
    section = page.partition("### What it looks for")[2].partition("\n## ")[0]
    listed = set(re.findall(r"\w+", section))
    for known in KNOWN:
        assert {known.name, *known.parts.split()} <= listed
        if not known.parts:
            parameters = ", ".join(known.methods["forward"].split())
            assert f"forward({parameters})" in section
    assert {f"`{name}`" for name in (*FORWARD_META, *RUNNER_METHODS)} <= set(
        re.findall(r"`\w+`", section)
    )
    for check in CHECKS:
        where, _, what = check.partition(": ")
        assert where in section and what in listed | {""}, check


@pytest.mark.parametrize(
    ("name", "ours"),
    [("pr7367", True), ("develop", False), ("develop", True), ("raising_import", True)],
)
def test_all_checks_pass_and_change_nothing(name: str, ours: bool) -> None:
    """FastDeploy's own classes are looked at, where ours are bound too."""
    with installed({**TREES, **BROKEN}[name], OURS_ENV if ours else UPSTREAM_ENV):
        import_all()
        if ours:
            register()
        assert is_ours(live_backend()) is ours
        before = snapshot()
        found = checks()
        assert changed(before, snapshot()) == set()
    assert found == [{"name": name, "passed": True, "reason": ""} for name in CHECKS]


def test_one_check_that_fails_hides_no_other() -> None:
    with imported():
        sys.modules[ATTENTION].DSAAttentionBackend.forward = another("q")
        del sys.modules[MODELS].Indexer
        # a form that nobody has thought of
        sys.modules[LINEAR].KVBatchLinear = SimpleNamespace(forward=3)
        assert failed() == {
            "layers/attention: DSAAttentionBackend": (
                f"DSAAttentionBackend.forward takes (q), known is ({', '.join(METHODS)})"
            ),
            "models/deepseek_v3.py: Indexer": "models/deepseek_v3.py has no Indexer",
            "layers/linear.py: KVBatchLinear": "TypeError: 3 is not a callable object",
        }
        # the first one is what a log says
        with pytest.raises(UnsupportedTree, match=r"DSAAttentionBackend.forward takes"):
            examine()


def test_the_fields_are_those_that_ours_read() -> None:
    """What ours set themselves, and what they can do without, is not looked for."""
    own = {"fd_dsa_step", "position_ids", "slot_mapping", "indexer_attn_mask_offsets"}
    read = set()
    for folder in ("fastdeploy_plugin", "attention"):
        for file in (ROOT / "fd_dsa" / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "forward_meta":
                    read.add(node.attr)
    by_name = {"block_tables", "max_len_tensor_cpu", "seq_lens_this_time", "attn_backend"}
    assert read - own | by_name == set(FORWARD_META)


def test_the_runner_is_examined_where_it_can_be_imported() -> None:
    with imported():
        runner, missing = sys.modules[RUNNER].GPUModelRunner, RUNNER_METHODS[3]
        delattr(next(one for one in runner.__mro__ if missing in vars(one)), missing)
        name = "worker/gpu_model_runner.py: GPUModelRunner"
        assert failed() == {name: f"GPUModelRunner has no {missing}"}
        # not by `register`, which runs in every process
        examine()
        sys.modules[RUNNER] = None  # type: ignore[assignment]
        (found,) = (one for one in checks() if one["name"] == name)
        examine()
    assert found["passed"] is None
    assert found["reason"].startswith(f"not examined here: {RUNNER} cannot be imported: ")
