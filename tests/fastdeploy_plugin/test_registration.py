"""The take-over: our classes through FastDeploy's doors, or FastDeploy exactly as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.fastdeploy_plugin import model_runner, register
from fd_dsa.fastdeploy_plugin.take_over import is_ours
from fd_dsa.fastdeploy_plugin.tree_checks import checks
from tests.fakes.trees import (
    BROKEN,
    OURS_ENV,
    TREES,
    UPSTREAM_ENV,
    Tree,
    environment,
    installed,
    plugin_distribution,
)
from tests.fastdeploy_plugin.names import (
    ATTENTION,
    MODELS,
    REGISTRY,
    RUNNER,
    WORKER,
    changed,
    import_all,
    our_lines,
    registered_model,
    snapshot,
)

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "fastdeploy.model_register_plugins": "fd_dsa.fastdeploy_plugin:register",
    "fastdeploy.model_runner_plugins": "fd_dsa.fastdeploy_plugin:model_runner",
}
REFUSED = [
    ("before_7367", "DeepseekV32ForCausalLM has a pre_process: a tree before #7367"),
    ("missing_symbol", "models/deepseek_v3.py has no Indexer"),
]
# the one name without a door, and FastDeploy's own registry
REPLACED = {
    f"{ATTENTION}:DSAAttentionBackend",
    "registry:DeepseekV32ForCausalLM",
    "registry:GlmMoeDsaForCausalLM",
}


def test_both_groups_name_us() -> None:
    found = {group: {e.name: e.value for e in entry_points(group=group)} for group in GROUPS}
    assert {group: names["fd_dsa"] for group, names in found.items()} == GROUPS


@pytest.mark.parametrize("name", TREES)
def test_one_name_is_bound_and_models_are_registered(name: str, caplog: Any) -> None:
    with installed(TREES[name], UPSTREAM_ENV):
        theirs = import_all()
        # cached before: FastDeploy looks again
        assert not is_ours(sys.modules[ATTENTION].get_attention_backend())
        before = snapshot()
        runner = model_runner()
        assert changed(before) == REPLACED
        assert is_ours(runner) and issubclass(runner, theirs)
        backend = sys.modules[ATTENTION].get_attention_backend()
        assert is_ours(backend) and issubclass(backend, before[f"{ATTENTION}:DSAAttentionBackend"])
        registry = sys.modules[REGISTRY].ModelRegistry
        for architecture in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"):
            model = registry.get_class(architecture)
            assert is_ours(model) and issubclass(model, before[f"registry:{architecture}"])
            # FastDeploy's other way to a class: by its module and name
            assert registry().resolve_model_cls(architecture) is model
    (line,) = our_lines(caplog.records)
    assert line.startswith("fd_dsa: serves FastDeploy's DSA path (FastDeploy 0.0.0+fake, derived")


def test_registering_alone_changes_and_says_nothing(caplog: Any) -> None:
    with installed(TREES["develop"], UPSTREAM_ENV):
        import_all()
        before = snapshot()
        register()
        assert changed(before) == set()
    assert our_lines(caplog.records) == []


@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_a_tree_that_does_not_fit_stays_as_it_is(name: str, reason: str, caplog: Any) -> None:
    with installed(BROKEN[name], UPSTREAM_ENV):
        theirs = import_all()
        before = snapshot()
        assert model_runner() is model_runner() is theirs
        assert changed(before) == set()
    (line,) = our_lines(caplog.records)
    assert line.startswith("fd_dsa: unsupported FastDeploy tree (") and reason in line


@pytest.mark.parametrize(
    "env",
    [
        {"FD_ATTENTION_BACKEND": "MLA_ATTN"},
        {"FD_ATTENTION_BACKEND": None},
        {"FD_DSA_DISABLE": "1"},
        {"FD_DSA_DISABLE": "true"},
        {"FD_DSA_DISABLE": "perhaps"},
    ],
    ids=str,
)
def test_nothing_is_replaced_unless_dsa_is_wanted(env: Any, caplog: Any) -> None:
    with installed(TREES["develop"], {**UPSTREAM_ENV, **env}):
        theirs = import_all()
        before = snapshot()
        register()
        assert model_runner() is theirs and changed(before) == set()
    lines = our_lines(caplog.records)
    assert len(lines) == (env.get("FD_DSA_DISABLE") == "perhaps")
    assert all("FD_DSA_DISABLE: got 'perhaps'" in line for line in lines)


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises this."""

    def function(*_: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("fails", ["layers.PluginIndexer", "models.PluginModel"])
def test_a_failure_half_way_replaces_nothing(
    fails: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(TREES["develop"], UPSTREAM_ENV):
        theirs = import_all()
        monkeypatch.setattr(f"fd_dsa.fastdeploy_plugin.{fails}", None)
        before = snapshot()
        assert model_runner() is theirs and changed(before) == set()
    (line,) = our_lines(caplog.records)
    assert "AttributeError" in line


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, GeneratorExit, AssertionError])
def test_no_error_of_ours_reaches_fastdeploy(
    error: type[BaseException], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = raising(error("all is lost\nin two lines"))
    monkeypatch.setattr("fd_dsa.fastdeploy_plugin.take_over.examine", broken)
    with installed(TREES["develop"], OURS_ENV):
        assert import_module(WORKER).ModelRunner is sys.modules[RUNNER].GPUModelRunner
    (line,) = our_lines(caplog.records)
    assert "all is lost in two lines" in line


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_signal_ends_the_process(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fd_dsa.fastdeploy_plugin.take_over.examine", raising(stop()))
    with installed(TREES["develop"], UPSTREAM_ENV), pytest.raises(stop):
        model_runner()


@pytest.mark.parametrize(
    ("tree", "plugins", "ours"),
    [
        (TREES["develop"], None, False),
        (TREES["pr7367"], None, True),
        (TREES["develop"], "fd_dsa", True),
        (TREES["develop"], "other,fd_dsa", True),
        (TREES["pr7367"], "other", False),
        (TREES["develop"], "", False),
        (BROKEN["before_7367"], "fd_dsa", False),
    ],
)
def test_fd_plugins(tree: Tree, plugins: str | None, ours: bool, caplog: Any) -> None:
    """FastDeploy's own loaders find us, or do not."""
    with installed(tree, {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": plugins}):
        runner = import_module(WORKER).ModelRunner
        assert is_ours(runner) is is_ours(registered_model()) is ours
        assert is_ours(sys.modules[ATTENTION].DSAAttentionBackend) is ours
    assert len(our_lines(caplog.records)) == (ours or tree.defect != "")


def test_another_runner_plugin_is_one_clear_line(tmp_path: Path, caplog: Any) -> None:
    """Two runners are one too many for FastDeploy, which takes its own without a word."""
    (tmp_path / "other_runner.py").write_text("def runner():\n    return object\n")
    plugin_distribution(tmp_path, "other", runner="other_runner:runner")
    env = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "other,fd_dsa"}
    with installed(TREES["develop"], env, path=[tmp_path]):
        assert import_module(WORKER).ModelRunner is sys.modules[RUNNER].GPUModelRunner
        assert not is_ours(registered_model())
        assert not is_ours(sys.modules[ATTENTION].DSAAttentionBackend)
        assert [one["name"] for one in checks() if not one["passed"]] == ["plugins: runner class"]
    (line,) = our_lines(caplog.records)
    assert "fastdeploy.model_runner_plugins: got fd_dsa, other; FastDeploy takes one" in line
    assert "name only fd_dsa in FD_PLUGINS" in line


# what the take-over adds to a process; an allocation counts wherever it lies
_CHILD = f"""
import json, sys
from importlib import import_module
import_module("{MODELS}")
import_module("{RUNNER}")
import paddle
made = []
for name in ("zeros", "empty", "full", "to_tensor", "randn", "ones"):
    setattr(paddle, name, lambda *a, _n=name, **k: made.append(_n))
before = set(sys.modules)
runner = import_module("{WORKER}").ModelRunner
backend = import_module("{ATTENTION}").get_attention_backend()
new = sorted(set(sys.modules) - before)
print(json.dumps([runner.__module__, backend.__module__, made, new]))
"""


def test_a_worker_process_loads_no_kernel_makes_no_tensor_and_says_who_serves() -> None:
    """Also if the process has no log configuration."""
    changes = environment(TREES["develop"], OURS_ENV)
    variables = {n: v for n, v in {**os.environ, **changes}.items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    runner, backend, made, new = json.loads(done.stdout.splitlines()[-1])
    assert runner == "fd_dsa.fastdeploy_plugin.runner"
    assert backend == "fd_dsa.fastdeploy_plugin.backend"
    assert made == [] and {name.partition(".")[0] for name in new} & {"triton", "torch"} == set()
    kernels = [n for n in new if "kernel" in n or n.startswith("fd_dsa.triton_runtime")]
    assert kernels == []
    assert (done.stdout + done.stderr).count("fd_dsa: serves FastDeploy's DSA path") == 1
