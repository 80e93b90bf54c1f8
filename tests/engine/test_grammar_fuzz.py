"""Random schemas, grammars, regular expressions and tools stay within bounds of time and memory."""

from __future__ import annotations

import pytest

from tests.soak.grammars import KINDS, fuzz

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")


@pytest.mark.parametrize("kind", KINDS)
def test_random_grammars_stay_within_bounds(kind: str) -> None:
    ends = fuzz(kind, 25)
    assert ends["followed"] > 2
