"""Registration: our classes under FastDeploy's names, or every name exactly as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from fd_dsa.fastdeploy_plugin import model_runner, register
from fd_dsa.fastdeploy_plugin.take_over import is_ours
from tests.fakes.trees import BROKEN, OURS_ENV, TREES, UPSTREAM_ENV, Tree, installed
from tests.fastdeploy_plugin.names import (
    ATTENTION,
    MODELS,
    RUNNER,
    WORKER,
    changed,
    import_all,
    our_lines,
    snapshot,
)

SERVED = [TREES["pr7367"], TREES["develop"]]
REFUSED = [
    (BROKEN["before_7367"], "DeepseekV3ForCausalLM has a pre_process: a tree before #7367"),
    (BROKEN["missing_symbol"], "models/deepseek_v3.py has no Indexer"),
]
BACKEND_FILE = f"{ATTENTION}.dsa_attention_backend"
BOUND = {
    f"{ATTENTION}:DSAAttentionBackend",
    f"{BACKEND_FILE}:DSAAttentionBackend",
    f"{MODELS}:Indexer",
    f"{MODELS}:DeepseekV32DSAAttention",
}


def raising(error: BaseException) -> Callable[[], Any]:
    """A function that raises this."""

    def function() -> Any:
        raise error

    return function


def ids(trees: list[Any]) -> list[str]:
    return [(one if isinstance(one, Tree) else one[0]).name for one in trees]


def with_upstream_imported(tree: Tree) -> Any:
    """A tree whose loaders do not find us, all of it imported."""
    return installed(tree, UPSTREAM_ENV)


@pytest.mark.parametrize("tree", SERVED, ids=ids(SERVED))
def test_register_binds_backend_indexer_and_attention(tree: Tree, caplog: Any) -> None:
    with with_upstream_imported(tree):
        import_all()
        # asked for before: it is asked for again
        assert not is_ours(sys.modules[ATTENTION].get_attention_backend())
        before = snapshot()
        register()
        found = changed(before, snapshot())
        attention, models = sys.modules[ATTENTION], sys.modules[MODELS]
        assert found == BOUND
        for name in BOUND:
            module, _, attribute = name.partition(":")
            ours = getattr(sys.modules[module], attribute)
            assert is_ours(ours)
            assert issubclass(ours, before[name])
        assert attention.get_attention_backend() is attention.DSAAttentionBackend
        assert models.Indexer.__name__ == "Indexer"
        # a second time changes and says nothing
        before = snapshot()
        register()
        assert changed(before, snapshot()) == set()
    lines = our_lines(caplog.records)
    assert len(lines) == 1
    assert "derived from its DSA backend" in lines[0]


@pytest.mark.parametrize(("tree", "reason"), REFUSED, ids=ids(REFUSED))
def test_a_tree_that_does_not_fit_stays_as_it_is(tree: Tree, reason: str, caplog: Any) -> None:
    with with_upstream_imported(tree):
        import_module(MODELS)
        before = snapshot()
        register()
        register()
        assert changed(before, snapshot()) == set()
    (line,) = our_lines(caplog.records)
    assert line.startswith("fd_dsa: unsupported FastDeploy tree (")
    assert reason in line


def test_a_backend_that_cannot_be_imported_is_replaced(caplog: Any) -> None:
    """Without FlashMLA or operators FastDeploy has no DSA backend; ours needs neither."""
    with with_upstream_imported(BROKEN["raising_import"]):
        import_module(MODELS)
        attention = sys.modules[ATTENTION]
        assert not hasattr(attention, "DSAAttentionBackend")
        register()
        assert issubclass(attention.DSAAttentionBackend, attention.AttentionBackend)
        assert attention.get_attention_backend() is attention.DSAAttentionBackend
    (line,) = our_lines(caplog.records)
    assert "in place of its DSA backend" in line


SWITCHED_OFF = [
    {"FD_ATTENTION_BACKEND": "MLA_ATTN"},
    {"FD_ATTENTION_BACKEND": None},
    {"FD_DSA_DISABLE": "1"},
    {"FD_DSA_DISABLE": "true"},
    {"FD_DSA_DISABLE": "perhaps"},
]


@pytest.mark.parametrize("env", SWITCHED_OFF, ids=str)
def test_without_our_backend_nothing_is_patched(env: Any, caplog: Any) -> None:
    with installed(TREES["develop"], {**UPSTREAM_ENV, **env}):
        import_all()
        before = snapshot()
        register()
        runner = model_runner()
        assert changed(before, snapshot()) == set()
        assert runner is sys.modules[RUNNER].GPUModelRunner
    lines = our_lines(caplog.records)
    assert len(lines) == (env.get("FD_DSA_DISABLE") == "perhaps")
    assert all("FD_DSA_DISABLE: got 'perhaps'" in line for line in lines)


@pytest.mark.parametrize("fails", ["PluginIndexer", "cache_clear"])
def test_a_failure_half_way_puts_all_names_back(
    fails: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_upstream_imported(TREES["develop"]):
        import_all()
        if fails == "cache_clear":
            select = sys.modules[f"{ATTENTION}.attention_selecter"]._get_attn_backend
            module = sys.modules[f"{ATTENTION}.attention_selecter"]
            wrapper = lambda name: select(name)  # noqa: E731 - lru_cache objects take no attribute
            wrapper.cache_clear = raising(RuntimeError("half way"))  # type: ignore[attr-defined]
            monkeypatch.setattr(module, "_get_attn_backend", wrapper)
        else:
            monkeypatch.setattr(f"fd_dsa.fastdeploy_plugin.layers.{fails}", None)
        before = snapshot()
        register()
        assert changed(before, snapshot()) == set()
    (line,) = our_lines(caplog.records)
    assert ("RuntimeError: half way" if fails == "cache_clear" else "AttributeError") in line


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, GeneratorExit, AssertionError])
def test_register_raises_nothing_into_fastdeploy(
    error: type[BaseException], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = raising(error("all is lost\nin two lines"))
    monkeypatch.setattr("fd_dsa.fastdeploy_plugin.take_over.examine", broken)
    with installed(TREES["develop"], OURS_ENV):
        import_module(WORKER)
        assert sys.modules[WORKER].ModelRunner is sys.modules[RUNNER].GPUModelRunner
    (line,) = our_lines(caplog.records)
    assert "all is lost in two lines" in line


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_is_let_go(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fd_dsa.fastdeploy_plugin.take_over.examine", raising(stop()))
    with with_upstream_imported(TREES["develop"]), pytest.raises(stop):
        register()


@pytest.mark.parametrize("runner_first", [True, False], ids=["runner first", "register first"])
def test_the_runner_knows_the_backend_in_either_order(runner_first: bool) -> None:
    with with_upstream_imported(TREES["develop"]):
        import_module(RUNNER if runner_first else MODELS)
        register()
        import_module(RUNNER)
        ours = sys.modules[ATTENTION].get_attention_backend()
        # the runner's step after #7367 asks with isinstance
        assert issubclass(ours, sys.modules["fastdeploy.worker._runner_step"].DSAAttentionBackend)


def test_models_that_have_taken_a_layer_from_its_module_get_ours() -> None:
    with with_upstream_imported(TREES["develop"]):
        models = import_module(MODELS)
        other = ModuleType("fastdeploy.model_executor.models.glm_moe_dsa")
        other.Indexer = models.Indexer  # type: ignore[attr-defined]
        other.DeepseekV32DSAAttention = object  # type: ignore[attr-defined]
        sys.modules[other.__name__] = other
        register()
        assert other.Indexer is models.Indexer
        assert is_ours(other.Indexer)
        # a class of its own under the same name is its own
        assert other.DeepseekV32DSAAttention is object


def test_what_was_said_goes_with_the_modules(caplog: Any) -> None:
    """A FastDeploy that is imported again is examined again."""
    for tree in (BROKEN["before_7367"], TREES["develop"], BROKEN["before_7367"]):
        with with_upstream_imported(tree):
            register()
            assert is_ours(sys.modules[ATTENTION].DSAAttentionBackend) is (tree.defect == "")
    assert ["unsupported" in line for line in our_lines(caplog.records)] == [True, False, True]
