"""Caches and selections that are not there yet: a named error, not an attribute of None."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fd_dsa.errors import MissingStepError, ShapeError
from tests.attention.harness import ROPE, Sizes, World, world_of
from tests.strategies import make_batch

ROWS = [(3, 2, 3), (0, 9, 1)]


@pytest.fixture
def world() -> World:
    return world_of(make_batch(ROWS, 16), Sizes())


def forward(world: World, meta: Any, v: Any) -> Any:
    return world.backend.forward(
        q=world.packed(0, ROWS, 0, "q"),
        k=None,
        v=v,
        qkv=None,
        compressed_kv=world.packed(0, ROWS, 0, "latent"),
        k_pe=world.packed(0, ROWS, 0, "k_pe").reshape([-1, 1, ROPE]),
        layer=SimpleNamespace(layer_id=0),
        forward_meta=meta,
    )


def index(world: World, meta: Any) -> Any:
    given = [world.packed(0, ROWS, 0, n) for n in ("index_q", "index_k", "weights")]
    return world.backend.indexer_forward(*given, 0, meta)


@pytest.mark.parametrize("caches", [None, [None, None]])
def test_caches_not_allocated(world: World, caches: Any) -> None:
    meta = world.begin(ROWS)
    slots = index(world, meta)
    meta.caches = caches
    with pytest.raises(MissingStepError, match="caches"):
        index(world, meta)
    with pytest.raises(MissingStepError, match="caches"):
        forward(world, meta, slots)


def test_no_selection(world: World) -> None:
    with pytest.raises(MissingStepError, match="indexer"):
        forward(world, world.begin(ROWS), None)


def test_selection_of_another_length(world: World) -> None:
    meta = world.begin(ROWS)
    slots = index(world, meta)
    with pytest.raises(ShapeError, match=r"\[3, 8\].*\[4, \*\]"):
        forward(world, meta, slots[:3])
