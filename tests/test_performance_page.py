"""docs/performance.md shows the committed results, line by line."""

from __future__ import annotations

import json

from benchmarks._harness import RESULTS, ROOT
from benchmarks.report import engine_cpu


def test_figures_are_those_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    result = json.loads((RESULTS / "engine_cpu.json").read_text())
    assert engine_cpu(result) in page


def test_results_name_machine_and_commit() -> None:
    for path in RESULTS.glob("*.json"):
        env = json.loads(path.read_text())["env"]
        assert env["cpu"] and len(env["commit"]) == 40 and not env["dirty"], path
