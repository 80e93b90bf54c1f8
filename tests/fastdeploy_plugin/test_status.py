"""The live path of a process with FastDeploy, and the reason, as the doctor shows them."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from fd_dsa.fastdeploy_plugin.status import report
from tests.fakes.trees import BROKEN, OURS_ENV, TREES, UPSTREAM_ENV, V1_VARIABLE, installed


@pytest.mark.parametrize("name", TREES)
def test_our_path(name: str) -> None:
    with installed(TREES[name], OURS_ENV):
        found = report()
    assert found["live"] and found["why"].endswith(" its DSA backend")
    assert found["error"] == "" and found["version"] == "0.0.0+fake"
    assert all(check["passed"] for check in found["checks"])
    # only FastDeploy's own path needs it
    needed = {V1_VARIABLE: "1"} if TREES[name].v1_cache_manager else {}
    assert found["own_path_variables"] == needed
    assert json.loads(json.dumps(found)) == found


WHY_NOT: list[tuple[str, dict[str, Any], str]] = [
    ("develop", {"FD_ATTENTION_BACKEND": "MLA_ATTN"}, "FD_ATTENTION_BACKEND is MLA_ATTN, not DSA"),
    ("develop", {"FD_ATTENTION_BACKEND": None}, "FD_ATTENTION_BACKEND is unset, not DSA_ATTN"),
    ("develop", {"FD_DSA_DISABLE": "1"}, "FD_DSA_DISABLE turns the plug-in off"),
    ("develop", {"FD_DSA_DISABLE": "no"}, "FD_DSA_DISABLE: got 'no'"),
    ("develop", {"FD_PLUGINS": None}, "FD_PLUGINS is unset, and must name it"),
    ("pr7367", {"FD_PLUGINS": "other"}, "FD_PLUGINS is other, and must name it"),
    ("before_7367", {}, "unsupported FastDeploy tree (DeepseekV32ForCausalLM has a pre_process"),
    ("missing_symbol", {}, "unsupported FastDeploy tree (models/deepseek_v3.py has no Indexer"),
]


@pytest.mark.parametrize(("name", "env", "why"), WHY_NOT, ids=[f"{n} {e}" for n, e, _ in WHY_NOT])
def test_fastdeploys_own_path(name: str, env: dict[str, Any], why: str) -> None:
    with installed({**TREES, **BROKEN}[name], {**OURS_ENV, **env}):
        found = report()
    assert not found["live"] and why in found["why"]
    # a tree that fits is no matter of the environment
    assert all(check["passed"] for check in found["checks"]) is (name in TREES)


def test_a_worker_that_cannot_be_imported_is_never_said_to_serve() -> None:
    """Its import needs what a worker needs, and the start would fail at the same place."""
    with installed(TREES["develop"], OURS_ENV):
        import fastdeploy.worker  # noqa: F401

        sys.modules["fastdeploy.worker.gpu_model_runner"] = None  # type: ignore[assignment]
        found = report()
    assert not found["live"] and "gpu_worker cannot be imported" in found["why"]
    assert [one["reason"] for one in found["checks"] if not one["passed"]]


def test_v1s_cache_manager_of_an_older_tree_is_refused() -> None:
    """A tree before #7787 has none for DSA: with the variable its start fails."""
    with installed(TREES["pr7367"], {**UPSTREAM_ENV, **OURS_ENV, V1_VARIABLE: "1"}):
        found = report()
    assert not found["live"]
    assert f"{V1_VARIABLE} is set, and DSAAttentionBackend has no create_kv_cache" in found["why"]
