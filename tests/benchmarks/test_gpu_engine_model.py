"""The least that a case of benchmarks.gpu_engine can take, on one GPU and on several."""

from __future__ import annotations

import json

import pytest

from benchmarks._gpu_engine_model import CASES, Shape, floor, shape_of
from benchmarks._harness import RESULTS


def test_floors_are_those_that_were_published() -> None:
    cases = json.loads((RESULTS / "gpu_engine.json").read_text())["cases"]
    assert len(cases) > len(CASES)
    for case in cases:
        one = CASES[case["case"].partition(",")[0]]
        assert floor(one, shape_of(1, None)) == pytest.approx(case["floor"])


def test_ranks_share_all_but_projections_indexer_and_caches() -> None:
    case = CASES["decode-1x4k"]
    one, four, many = (floor(case, shape_of(4, None)._replace(ranks=n)) for n in (1, 4, 1 << 20))
    assert one is not None and four is not None and many is not None
    # what is shared is cut, and the rest is what very many ranks still read
    assert four == pytest.approx(many + (one - many) / 4, rel=0.01)
    assert shape_of(4, 8) == Shape(8, 3, 128, 4)
