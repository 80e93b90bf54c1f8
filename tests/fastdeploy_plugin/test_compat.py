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

from fd_dsa.fastdeploy_plugin.compat import Tree as Found
from fd_dsa.fastdeploy_plugin.compat import examine
from fd_dsa.fastdeploy_plugin.entry_points import register
from fd_dsa.fastdeploy_plugin.take_over import is_ours, live_backend
from fd_dsa.fastdeploy_plugin.tree_checks import (
    CHECKS,
    FORWARD_META,
    KNOWN,
    RUNNER_METHODS,
    Known,
    UnsupportedTree,
    checks,
)
from tests.fakes.trees import BROKEN, OURS_ENV, TREES, UPSTREAM_ENV, installed
from tests.fastdeploy_plugin.names import ATTENTION, MODELS, RUNNER, changed, import_all, snapshot

ROOT = Path(__file__).parents[2]


@contextmanager
def imported(name: str = "develop") -> Iterator[None]:
    """A tree, all of it imported, that no plug-in has touched."""
    with installed({**TREES, **BROKEN}[name], UPSTREAM_ENV):
        import_all()
        yield


@pytest.mark.parametrize("name", TREES)
def test_features_of_the_trees(name: str) -> None:
    with imported(name):
        found = examine()
        assert isinstance(found, Found)
        assert found.backend_base is sys.modules[ATTENTION].DSAAttentionBackend
    assert found.summary() == "FastDeploy 0.0.0+fake, derived from its DSA backend"


def test_without_the_upstream_class_the_abstract_base_serves() -> None:
    with installed(BROKEN["raising_import"], UPSTREAM_ENV):
        import_module(MODELS)
        found = examine()
        assert found.backend_base is sys.modules[ATTENTION].AttentionBackend
        assert found.backend_file is None
    assert found.summary().endswith("in place of its DSA backend")


def another(*names: str) -> Callable[..., None]:
    """A method with these parameters after `self`."""
    scope: dict[str, Any] = {}
    exec(f"def method(self, {', '.join(names)}): pass", scope)
    return scope["method"]


METHODS = ["q", "k", "v", "qkv", "compressed_kv", "k_pe", "layer", "forward_meta"]
CHANGES = [
    ("DSAAttentionBackend", "__init__", ["fd_config", "num_heads"], "__init__ takes"),
    ("DSAAttentionBackend", "forward_mixed", METHODS[:-1], "forward_mixed takes"),
    ("DSAAttentionBackend", "forward", [*METHODS, "sinks"], "forward takes"),
    ("DSAAttentionBackend", "init_attention_metadata", ["forward_meta", "kind"], "takes"),
    ("DSAAttentionBackend", "get_kv_cache_shape", ["max_num_blocks"], "get_kv_cache_shape takes"),
    ("Indexer", "__init__", ["fd_config", "layer_id"], "Indexer.__init__ takes"),
    ("Indexer", "forward", ["forward_meta", "hidden_states", "qr"], "Indexer.forward takes"),
    ("DeepseekV32DSAAttention", "__init__", ["fd_config", "prefix"], "__init__ takes"),
    ("DeepseekV32DSAAttention", "forward", ["hidden_states"], "forward takes (hidden_states)"),
    ("DeepseekV3ForCausalLM", "pre_process", ["forward_meta"], "a tree before #7367"),
]


@pytest.mark.parametrize(
    ("owner", "name", "parameters", "reason"), CHANGES, ids=[f"{c[0]}.{c[1]}" for c in CHANGES]
)
def test_another_signature_is_refused(
    owner: str, name: str, parameters: list[str], reason: str
) -> None:
    with imported():
        module = sys.modules[ATTENTION if owner == "DSAAttentionBackend" else MODELS]
        setattr(getattr(module, owner), name, another(*parameters))
        with pytest.raises(UnsupportedTree, match=f"{owner}.*") as caught:
            examine()
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda self, max_num_blocks, kv_cache_quant_type=None: ([2, 1, 64, 656], []), "gives"),
        (
            lambda self, max_num_blocks, kv_cache_quant_type=None: (
                [max_num_blocks, 1, 64, 576],
                [],
                [max_num_blocks, 64, 132],
            ),
            "576",
        ),
        (lambda self, max_num_blocks, kv_cache_quant_type=None: self.not_there, "not_there"),
    ],
    ids=["two", "another row", "another way"],
)
def test_other_caches_are_refused(given: Any, reason: str) -> None:
    with imported():
        sys.modules[ATTENTION].DSAAttentionBackend.get_kv_cache_shape = given
        with pytest.raises(UnsupportedTree, match="get_kv_cache_shape") as caught:
            examine()
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("known", "part"),
    [pytest.param(one, part, id=f"{one.name}.{part}") for one in KNOWN for part in one.parts],
)
def test_a_layer_whose_part_has_another_name_is_refused(known: Known, part: str) -> None:
    """It would be found in the first step, by an AttributeError."""
    with imported():
        module = import_module(f"fastdeploy.model_executor.{known.module}")
        source = inspect.getsource(getattr(module, known.name))
        exec(re.sub(rf"\b{part}\b", f"{part}_2", source), vars(module))
        with pytest.raises(UnsupportedTree, match=f"{known.name} has no {part}$"):
            examine()


@pytest.mark.parametrize("layer", ["Indexer", "DeepseekV32DSAAttention"])
def test_parts_that_a_base_class_makes_are_found(layer: str) -> None:
    """As from #8042 on, where MLA's constructor makes DSA's layers."""
    with imported():
        models = sys.modules[MODELS]
        setattr(models, layer, type(layer, (getattr(models, layer),), {}))
        assert isinstance(examine(), Found)


def test_the_page_lists_what_is_looked_for() -> None:
    page = (ROOT / "docs" / "fastdeploy.md").read_text(encoding="utf-8")
    section = page.partition("### What it looks for")[2].partition("\n## ")[0]
    listed = set(re.findall(r"\w+", section))
    for known in KNOWN:
        assert {known.name, *known.parts} <= listed
        if not known.parts:
            assert f"forward({', '.join(known.methods['forward'])})" in section
    assert {f"`{name}`" for name in (*FORWARD_META, *RUNNER_METHODS)} <= set(
        re.findall(r"`\w+`", section)
    )
    for check in CHECKS:
        where, _, what = check.name.partition(": ")
        assert where in section and what in listed | {""}, check.name


def failed() -> dict[str, str]:
    """Name and reason of the checks that fail."""
    return {one["name"]: one["reason"] for one in checks() if not one["passed"]}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("pr7367", True),
        ("develop", False),
        ("develop", True),
        ("raising_import", True),
    ],
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
    assert found == [{"name": one.name, "passed": True, "reason": ""} for one in CHECKS]


def test_one_check_that_fails_hides_no_other() -> None:
    with imported():
        sys.modules[ATTENTION].DSAAttentionBackend.forward = another("q")
        del sys.modules[MODELS].Indexer
        # a form that nobody has thought of
        sys.modules["fastdeploy.model_executor.layers.linear"].KVBatchLinear = SimpleNamespace(
            forward=3
        )
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


@pytest.mark.parametrize("name", FORWARD_META)
def test_a_field_that_ours_read_must_be_there(name: str) -> None:
    with imported():
        meta = sys.modules["fastdeploy.model_executor.forward_meta"].ForwardMeta
        del meta.__annotations__[name]
        with pytest.raises(UnsupportedTree, match=f"^ForwardMeta has no {name}$"):
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
    by_name = {"block_tables", "max_len_tensor_cpu", "seq_lens_this_time"}
    assert read - own | by_name == set(FORWARD_META)


def test_the_runner_is_examined_where_it_can_be_imported() -> None:
    with imported():
        runner = sys.modules[RUNNER].GPUModelRunner
        missing, owner = (
            RUNNER_METHODS[3],
            next(one for one in runner.__mro__ if RUNNER_METHODS[3] in vars(one)),
        )
        delattr(owner, missing)
        name = "worker/gpu_model_runner.py: GPUModelRunner"
        assert failed() == {name: f"GPUModelRunner has no {missing}"}
        # not by `register`, which runs in every process
        examine()
        sys.modules[RUNNER] = None  # type: ignore[assignment]
        (found,) = (one for one in checks() if one["name"] == name)
        examine()
    assert found["passed"] is None
    assert found["reason"].startswith(f"not examined here: {RUNNER} cannot be imported: ")


def test_projections_that_are_called_otherwise_are_refused() -> None:
    """As from #8083 on, if its helpers take the place of `proj_type`."""
    with imported():
        linear = import_module("fastdeploy.model_executor.layers.linear")
        linear.KVBatchLinear.forward = another("x")
        with pytest.raises(UnsupportedTree, match=r"KVBatchLinear.forward takes \(x\)"):
            examine()


@pytest.mark.parametrize("name", ["Indexer", "DeepseekV32DSAAttention", "DeepseekV3ForCausalLM"])
def test_a_missing_model_class_is_refused(name: str) -> None:
    with imported():
        delattr(sys.modules[MODELS], name)
        with pytest.raises(UnsupportedTree, match=f"models/deepseek_v3.py has no {name}"):
            examine()


def test_a_list_of_backends_without_dsa_is_refused() -> None:
    with imported():
        base = sys.modules["fastdeploy.platforms.base"]
        base._Backend = type("_Backend", (), {"__members__": {"MLA_ATTN": 0}})
        with pytest.raises(UnsupportedTree, match="_Backend has no DSA_ATTN"):
            examine()


def test_a_module_that_cannot_be_imported_is_refused_by_name() -> None:
    with imported():
        sys.modules[f"{ATTENTION}.attention_selecter"] = None  # type: ignore[assignment]
        with pytest.raises(UnsupportedTree, match="attention_selecter cannot be imported"):
            examine()
