"""Second turns from host memory: a whole run in small, in which the context comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import host_tier


@pytest.mark.slow
def test_a_dry_run_takes_second_turns_from_host_memory(tmp_path: Path) -> None:
    assert host_tier.main(["--dry", "--rounds", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "host_tier.json").read_text())
    (case,) = result["cases"]
    context = host_tier.DRY_LOAD["context"]
    assert case["first_turn"]["cached"] == case["streams_beside_kept"]["from_host"] == 0
    assert case["streams_beside_kept"]["cached"] == context
    for name in ("second_turn", "streams_beside_copied"):
        assert case[name]["cached"] == context and case[name]["from_host"] > context / 2
    for name, most in host_tier.GATES.items():
        assert result[name]["passes"] == (result[name]["median"] <= most)
