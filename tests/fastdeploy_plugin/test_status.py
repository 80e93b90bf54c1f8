"""What is live in a process with FastDeploy, and why, as the doctor shows it."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import pytest

from fd_dsa.fastdeploy_plugin.status import report
from tests.fakes.trees import BROKEN, OURS_ENV, TREES, UPSTREAM_ENV, installed
from tests.fastdeploy_plugin.names import WORKER


@pytest.mark.parametrize("name", ["pr7367", "develop", "raising_import"])
def test_our_path(name: str) -> None:
    with installed({**TREES, **BROKEN}[name], OURS_ENV):
        found = report()
        import_module("fastdeploy.worker")
        # a worker's module needs its devices: without it there is no runner to show
        sys.modules[WORKER] = None  # type: ignore[assignment]
        without_worker = report()
    assert found["live"] and found["runner_is_ours"]
    assert found["error"] == "" and found["version"] == "0.0.0+fake"
    assert found["why"].endswith(" its DSA backend")
    assert all(check["passed"] for check in found["checks"])
    assert json.loads(json.dumps(found)) == found
    assert without_worker == {**found, "runner_is_ours": False}


WHY_NOT: list[tuple[str, dict[str, Any], str]] = [
    ("develop", {"FD_ATTENTION_BACKEND": "MLA_ATTN"}, "FD_ATTENTION_BACKEND is MLA_ATTN, not DSA"),
    ("develop", {"FD_ATTENTION_BACKEND": None}, "FD_ATTENTION_BACKEND is unset, not DSA_ATTN"),
    ("develop", {"FD_DSA_DISABLE": "1"}, "FD_DSA_DISABLE turns the plug-in off"),
    ("develop", {"FD_DSA_DISABLE": "no"}, "FD_DSA_DISABLE: got 'no'"),
    ("develop", {"FD_PLUGINS": None}, "FD_PLUGINS is unset, and must name it"),
    ("pr7367", {"FD_PLUGINS": "other"}, "FD_PLUGINS is other, and must name it"),
    ("before_7367", {}, "unsupported FastDeploy tree (DeepseekV3ForCausalLM has a pre_process"),
    ("missing_symbol", {}, "unsupported FastDeploy tree (models/deepseek_v3.py has no Indexer"),
]


@pytest.mark.parametrize(("name", "env", "why"), WHY_NOT, ids=[f"{n} {e}" for n, e, _ in WHY_NOT])
def test_fastdeploys_own_path(name: str, env: dict[str, Any], why: str) -> None:
    with installed({**TREES, **BROKEN}[name], {**OURS_ENV, **env}):
        found = report()
    assert not found["live"] and not found["runner_is_ours"]
    assert found["why"].startswith("unsupported") is why.startswith("unsupported")
    assert why in found["why"]
    reasons = [check["reason"] for check in found["checks"] if not check["passed"]]
    # the first that fails is what the log says; a tree that fits is no matter of the environment
    assert bool(reasons) is why.startswith("unsupported")
    assert not reasons or reasons[0] in found["why"]


def test_models_that_cannot_be_imported() -> None:
    with installed(TREES["develop"], UPSTREAM_ENV):
        sys.modules["fastdeploy.model_executor"] = None  # type: ignore[assignment]
        found = report()
        del sys.modules["fastdeploy.model_executor"]
    assert not found["error"] and not found["live"] and not found["runner_is_ours"]
    assert "deepseek_v3 cannot be imported" in found["why"]
    assert found["why"] in [check["reason"] for check in found["checks"]]
