"""Caches and selections that are not there yet: a named error, not an attribute of None."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from fd_dsa.errors import MissingStepError, ShapeError
from tests.attention.harness import Sizes, World, world_of
from tests.strategies import make_batch

ROWS = [(3, 2, 3), (0, 9, 1)]


@pytest.fixture
def world() -> World:
    return world_of(make_batch(ROWS, 16), Sizes())


def write(world: World, meta: Any) -> None:
    given = {n: world.packed(0, ROWS, 0, n) for n in ("latent", "k_pe", "index_k")}
    world.write(given, 0, meta)


def select(world: World, meta: Any) -> Any:
    given = [world.packed(0, ROWS, 0, n) for n in ("index_q", "weights")]
    return world.backend.select(*given, 0, meta)


def attend(world: World, meta: Any, selection: Any) -> Any:
    return world.backend.attend(world.packed(0, ROWS, 0, "q"), selection, 0, meta)


@pytest.mark.parametrize("caches", [None, [None, None]])
def test_caches_not_allocated(world: World, caches: Any) -> None:
    meta = world.begin(ROWS)
    slots = select(world, meta)
    meta.caches = caches
    for call in (write, select, partial(attend, selection=slots)):
        with pytest.raises(MissingStepError, match="caches"):
            call(world, meta)


def test_no_selection(world: World) -> None:
    with pytest.raises(MissingStepError, match="select of this layer"):
        attend(world, world.begin(ROWS), None)


def test_selection_of_another_length(world: World) -> None:
    meta = world.begin(ROWS)
    slots = select(world, meta)
    with pytest.raises(ShapeError, match=r"\[3, 8\].*\[4, \*\]"):
        attend(world, meta, slots[:3])
