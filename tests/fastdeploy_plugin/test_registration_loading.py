"""FastDeploy's own loaders find and call us: in this process, in spawned ones, beside others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.fastdeploy_plugin import model_runner
from fd_dsa.fastdeploy_plugin.take_over import is_ours
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
from tests.fastdeploy_plugin.names import ATTENTION, MODELS, RUNNER, WORKER, our_lines

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("fastdeploy.model_register_plugins", "fastdeploy.model_runner_plugins")


def worker_module() -> Any:
    """FastDeploy's worker, freshly imported: it loads the runner's plug-in."""
    return import_module(WORKER)


def live() -> Any:
    """The class that FastDeploy takes for DSA_ATTN."""
    return sys.modules[ATTENTION].DSAAttentionBackend


def test_both_groups_name_us() -> None:
    found = {group: {e.name: e.value for e in entry_points(group=group)} for group in GROUPS}
    assert found[GROUPS[0]]["fd_dsa"] == "fd_dsa.fastdeploy_plugin:register"
    assert found[GROUPS[1]]["fd_dsa"] == "fd_dsa.fastdeploy_plugin:model_runner"


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
        (BROKEN["missing_symbol"], "fd_dsa", False),
    ],
)
def test_fd_plugins(tree: Tree, plugins: str | None, ours: bool, caplog: Any) -> None:
    with installed(tree, {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": plugins}):
        runner = worker_module().ModelRunner
        assert is_ours(runner) is ours
        assert (runner is sys.modules[RUNNER].GPUModelRunner) is not ours
        assert issubclass(runner, sys.modules[RUNNER].GPUModelRunner)
        assert is_ours(live()) is ours
    assert len(our_lines(caplog.records)) == (ours or tree.defect != "")


def test_another_runner_plugin_leaves_us_the_backend(tmp_path: Path, caplog: Any) -> None:
    """Two runners are one too many for FastDeploy, which then takes its own."""
    (tmp_path / "other_runner.py").write_text("def runner():\n    return object\n")
    plugin_distribution(tmp_path, "other", runner="other_runner:runner")
    env = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "other,fd_dsa"}
    with installed(TREES["develop"], env, path=[tmp_path]):
        assert worker_module().ModelRunner is sys.modules[RUNNER].GPUModelRunner
        assert is_ours(live())
    assert len(our_lines(caplog.records)) == 1


def test_a_runner_of_another_kind_stays_as_it_is(caplog: Any) -> None:
    """As the one of worker/gpu/model_runner.py (7bd5ea13), which knows FlashInfer alone."""
    with installed(TREES["develop"], OURS_ENV):
        runner = import_module(RUNNER)
        runner.GPUModelRunner = type("GPUModelRunnerV1", (), {"initialize_kv_cache": print})
        assert model_runner() is runner.GPUModelRunner
    missing = "initialize_forward_meta, _initialize_attn_backend, _compute_position_ids_and"
    assert f"GPUModelRunnerV1 has no {missing}" in our_lines(caplog.records)[-1]


# what registering adds to a process; an allocation counts wherever it lies
_CHILD = """
import json, sys
from importlib import import_module
import_module("{models}")
import paddle
made = []
for name in ("zeros", "empty", "full", "to_tensor", "randn", "ones"):
    setattr(paddle, name, lambda *a, _n=name, **k: made.append(_n))
before = set(sys.modules)
from fd_dsa.fastdeploy_plugin import register
register()
import fastdeploy
attention = sys.modules["{attention}"]
print(json.dumps({{
    "ours": hasattr(attention.DSAAttentionBackend, "__fd_dsa__"),
    "new": sorted(set(sys.modules) - before),
    "made": made,
}}))
"""


def child(env: dict[str, str | None], code: str) -> tuple[Any, str]:
    """The last line that a process in this environment prints, as JSON, and all that it says."""
    inherited = {**os.environ, **env}
    variables = {name: value for name, value in inherited.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_registration_loads_no_kernel_and_makes_no_tensor() -> None:
    code = _CHILD.format(models=MODELS, attention=ATTENTION)
    found, _ = child(environment(TREES["develop"], UPSTREAM_ENV), code)
    assert found["ours"]
    assert found["made"] == []
    roots = {name.partition(".")[0] for name in found["new"]}
    assert roots & {"triton", "torch"} == set()
    assert [name for name in found["new"] if "kernel" in name] == []
    assert [name for name in found["new"] if name.startswith("fd_dsa.triton_runtime")] == []


def test_spawned_workers_are_served_and_say_so_where_nobody_configured_a_log() -> None:
    code = f"""
import json
from importlib import import_module
runner = import_module("{WORKER}").ModelRunner
backend = import_module("{ATTENTION}").get_attention_backend()
print(json.dumps([runner.__module__, backend.__module__]))
"""
    found, said = child(environment(TREES["develop"], OURS_ENV), code)
    assert found == ["fd_dsa.fastdeploy_plugin.runner", "fd_dsa.fastdeploy_plugin.backend"]
    assert said.count("fd_dsa: serves FastDeploy's DSA path") == 1
