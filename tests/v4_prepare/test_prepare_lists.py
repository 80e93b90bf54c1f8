"""The derived lists of a builder: those of the host functions, at fixed addresses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import ShapeError
from fd_dsa.v4_prepare import (
    V4Arrays,
    V4PrepareConfig,
    V4PrepareError,
    csa_translate,
    fused_list,
    v4_prepare_np,
)
from tests.v4_prepare.golden import CASES, config_of, inputs_of
from tests.v4_prepare.places import PLACES, Place, open_place
from tests.v4_prepare.test_prepare import CFG, STEPS, Step


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return open_place(request.param)


def numbers(cfg: V4PrepareConfig, out: V4Arrays, seed: int) -> np.ndarray:
    """Chosen entries of every token; some are none that the token sees."""
    rng = np.random.default_rng(seed)
    visible = out.csa_visible[:, None]
    chosen = rng.integers(0, np.maximum(visible, 1), (cfg.max_num_tokens, cfg.index_topk))
    garbage = rng.random(chosen.shape) < 0.3
    chosen[garbage] = rng.choice([-1, -(2**31), 2**31 - 1], garbage.sum())
    return np.where(rng.random(chosen.shape) < 0.1, visible, chosen).astype(np.int32)


def test_lists_are_those_of_the_host(place: Place) -> None:
    prepare = place.prepare(CFG)
    addresses: set[tuple[int, ...]] = set()
    for seed, step in enumerate(STEPS[:2]):
        prepare.stage(*step)
        prepare.expand()
        out = v4_prepare_np(CFG, *step)
        chosen = numbers(CFG, out, seed)
        rows = prepare.csa_translate(place.put(chosen))
        expected = csa_translate(out, step[3], chosen)
        np.testing.assert_array_equal(place.get(rows)[: len(expected)], expected)
        found = [prepare.fused_list("swa"), prepare.fused_list("hca")]
        for kind, lists in zip(("swa", "hca"), found, strict=True):
            assert_lists(place, lists, fused_list(out, kind))
        for csa_rows, given in ((None, None), (rows, expected)):
            lists = prepare.fused_list("csa", csa_rows)
            assert_lists(place, lists, fused_list(out, "csa", given))
        arrays = [rows, *lists, *found[0], *found[1]]
        addresses.add(tuple(map(place.address, arrays)))
    assert len(addresses) == 1


def assert_lists(place: Place, found: Any, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Compare offsets in full and rows up to the last offset."""
    np.testing.assert_array_equal(place.get(found.indptr), expected[0])
    np.testing.assert_array_equal(place.get(found.rows)[: len(expected[1])], expected[1])


def test_golden_of_chosen_entries(place: Place) -> None:
    case = CASES["G2"]
    cfg, golden = config_of(case["config"]), case["csa_translate"]
    prepare = place.prepare(cfg)
    prepare.stage(*inputs_of(case))
    prepare.expand()
    rows = prepare.csa_translate(place.put(np.array(golden["local_topk"], np.int32)))
    assert place.get(rows)[: len(golden["rows"])].tolist() == golden["rows"]


def test_chosen_entries_of_another_shape(place: Place) -> None:
    prepare = place.prepare(CFG)
    step: Step = STEPS[0]
    prepare.stage(*step)
    prepare.expand()
    for shape in ((11, 3), (12, 2), (36,)):
        with pytest.raises(ShapeError, match=r"must be \[12 or more, 3\]"):
            prepare.csa_translate(place.put(np.zeros(shape, np.int32)))


def test_lists_that_cannot_be_made(place: Place) -> None:
    prepare = place.prepare(CFG)
    rows = prepare.csa_translate(place.put(np.zeros((1, 3), np.int32)))
    with pytest.raises(ValueError, match="csa_rows: got rows for kind 'hca'"):
        prepare.fused_list("hca", rows)
    with pytest.raises(ValueError, match="kind: got 'both', allowed are"):
        prepare.fused_list("both")  # type: ignore[arg-type]


def test_lists_past_int32() -> None:
    # each list fits, their sum does not; nothing so large is allocated before that is seen
    from fd_dsa.v4_prepare.fixed_lists import fused_capacity

    sizes = {"max_num_tokens": 2**20, "max_model_len": 2**12, "max_blocks_per_seq": 2**9}
    cfg = replace(CFG, **sizes, window_size=2047, index_topk=2047, comp_base=0, hca_mode="table")
    with pytest.raises(V4PrepareError, match="E_INDPTR: batch: a fused list of"):
        fused_capacity(cfg, "csa")
