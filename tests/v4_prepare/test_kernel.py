"""The expand kernel against the loop oracle, in every memory that kernels run on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.v4_prepare import launch
from tests.strategies import examples
from tests.v4_prepare.cases import (
    CONFIGS,
    DEVICES,
    Place,
    assert_same,
    expected,
    make_step,
)

EXAMPLES = examples(4, in_soak=4)


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


ROWS = st.lists(
    st.tuples(st.integers(0, 100), st.sampled_from([0, 1, 1, 2, 3, 4, 5, 9, 19, 40])),
    max_size=4,
)


@EXAMPLES
@given(
    name=st.sampled_from(list(CONFIGS)),
    steps=st.lists(ROWS, min_size=1, max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_steps_equal_the_oracle(
    place: Place, name: str, steps: list[list[tuple[int, int]]], seed: int
) -> None:
    cfg, rng = CONFIGS[name], np.random.default_rng(seed)
    prepare, made = place.prepare(cfg), [make_step(cfg, rows, rng) for rows in steps]
    for step in made:
        assert_same(place.run(prepare, step), expected(cfg, step))
    place.assert_nothing_else(prepare, *made)


# every kind of work shared by several programs, in rounds and tiles that do not divide it
FINE = {
    "TOKEN_PARTS": 2,
    "WINDOW_PARTS": 3,
    "HCA_PARTS": 2,
    "TOKEN_TILE": 8,
    "WINDOW_ROWS": 4,
    "HCA_TILE": 4,
    "HCA_GROUP": 2,
    "ROW_TILE": 4,
    "num_warps": 1,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_rows_equal_the_oracle(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, rng = replace(CONFIGS[name], max_num_seqs=6), np.random.default_rng(3)
    tiles = FINE | {"HCA_PARTS": 0} if cfg.hca_mode == "table" else FINE
    assert set(tiles) == set(launch.tiles_for(cfg))
    monkeypatch.setattr(launch, "tiles_for", lambda cfg: tiles)
    prepare = place.prepare(cfg)
    step = make_step(cfg, [(0, 1), (62, 1), (7, 0), (95, 3), (31, 1), (50, 30)], rng)
    assert_same(place.run(prepare, step), expected(cfg, step))
    place.assert_nothing_else(prepare, step)


def test_a_long_row_is_shared_by_many_programs() -> None:
    cfg = replace(CONFIGS["ring"], max_num_tokens=8192, max_tokens_per_seq=8192)
    cfg = replace(cfg, max_model_len=131072, max_blocks_per_seq=8192, hca_mode="table")
    assert min(launch.tiles_for(cfg)[f"{kind}_PARTS"] for kind in ("WINDOW", "TOKEN")) >= 32
    # the lists of a lone decode row of 128k tokens
    cfg = replace(CONFIGS["decode"], max_model_len=131072, max_blocks_per_seq=8192)
    assert launch.tiles_for(cfg)["HCA_PARTS"] >= 8
