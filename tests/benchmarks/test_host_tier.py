"""Second turns from host memory: a whole run in small, in which the context comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import host_tier


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name", "load"),
    [
        ((), "host_tier", host_tier.DRY_LOAD),
        (("-tp", "2"), "host_tier_2", host_tier.DRY_LOAD),
        (("--v4",), "host_tier_v4", host_tier.V4_DRY_LOAD),
    ],
)
def test_a_dry_run_takes_second_turns_from_host_memory(
    flags: tuple[str, ...], name: str, load: dict[str, int], tmp_path: Path
) -> None:
    assert host_tier.main(["--dry", "--rounds", "1", "--out", str(tmp_path), *flags]) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    (case,) = result["cases"]
    context = load["context"]
    assert case["first_turn"]["cached"] == case["streams_beside_kept"]["from_host"] == 0
    assert case["streams_beside_kept"]["cached"] == context
    for turn in ("second_turn", "streams_beside_copied"):
        assert case[turn]["cached"] == context and case[turn]["from_host"] > context / 2
    for gate, most in host_tier.GATES.items():
        assert result[gate]["passes"] == (result[gate]["median"] <= most)
