"""Second turns from host memory: a whole run in small, in which the context comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import host_tier


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), [("1", "host_tier"), ("2", "host_tier_2")])
def test_a_dry_run_takes_second_turns_from_host_memory(
    ranks: str, name: str, tmp_path: Path
) -> None:
    arguments = ["--dry", "--rounds", "1", "--out", str(tmp_path), "-tp", ranks]
    assert host_tier.main(arguments) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    (case,) = result["cases"]
    context = host_tier.DRY_LOAD["context"]
    assert case["first_turn"]["cached"] == case["streams_beside_kept"]["from_host"] == 0
    assert case["streams_beside_kept"]["cached"] == context
    for turn in ("second_turn", "streams_beside_copied"):
        assert case[turn]["cached"] == context and case[turn]["from_host"] > context / 2
    for gate, most in host_tier.GATES.items():
        assert result[gate]["passes"] == (result[gate]["median"] <= most)
