"""Failures that other DSA engines have had, each as a test of the selected indices.

Sources: mlx-lm #1189, pypto-lib #592 (later chunks score their own chunk only), mlx-lm #1454 (only
trailing keys), mlx-lm #1443 (collapse at index_topk).
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.attention.harness import Sizes, World
from tests.reference.topk import ref_slot
from tests.strategies import make_batch

TOPK, LENGTH, NEEDLE = 8, 120, 5


def needle_world(dtype: str = "float32", length: int = LENGTH) -> World:
    """One row in which every query looks for the key at position `NEEDLE`, others score less."""
    batch = make_batch([(length, 0, length)], 16)
    world = World(Sizes(TOPK, 16, dtype), batch.block_tables, [length], batch.num_blocks, length)
    data = world.data[0][0]
    data.index_q[:] = 1
    data.weights[:] = 1
    data.index_k[:] = np.random.default_rng(0).integers(-2, 2, data.index_k.shape)
    data.index_k[NEEDLE] = 4
    return world


def positions(world: World, slots: np.ndarray) -> list[list[int]]:
    """Selected positions of each token; -1 stays."""
    place = {ref_slot(p, world.tables[0], 16): p for p in range(len(world.data[0][0].q))}
    return [[place[s] if s >= 0 else -1 for s in row] for row in slots.tolist()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [40, 16, 7])
def test_later_chunks_score_the_whole_prefix(dtype: str, chunk: int) -> None:
    world = needle_world(dtype)
    for start in range(0, LENGTH, chunk):
        new = min(chunk, LENGTH - start)
        found = positions(world, world.run([(new, start, new)]).slots[0])
        for j, row in enumerate(found):
            assert (NEEDLE in row) == (start + j >= NEEDLE), (start, j)


def test_decode_scores_the_whole_prefix() -> None:
    world = needle_world()
    world.remember(0, 0, LENGTH - 1)
    (found,) = positions(world, world.run([(0, LENGTH - 1, 1)]).slots[0])
    assert NEEDLE in found


def test_indices_are_not_all_trailing() -> None:
    """With scores that prefer the first keys, the last tokens select the first positions."""
    world = needle_world()
    data = world.data[0][0]
    data.index_k[:] = 1
    data.index_k[:TOPK] = 2
    found = positions(world, world.run([(LENGTH, 0, LENGTH)]).slots[0])
    for row in found[TOPK:]:
        assert row == list(range(TOPK))


def test_nothing_but_minus_one_past_the_count() -> None:
    world = needle_world()
    # a longer step first, so that the buffers hold other slots
    world.run([(LENGTH, 0, LENGTH)])
    slots = world.run([(20, 0, 20)]).slots[0]
    for position, row in enumerate(positions(world, slots)):
        count = min(position + 1, TOPK)
        assert row[count:] == [-1] * (TOPK - count)
        assert row[:count] == sorted(set(row[:count]))
        assert all(0 <= p <= position for p in row[:count])


@pytest.mark.parametrize("kind", ["prefill", "chunk", "decode"])
def test_no_jump_at_the_selection_s_size(kind: str) -> None:
    """Outputs at topk - 1, topk and topk + 1 keys follow one dense attention.

    The key that the (topk + 1)-th token drops weighs nothing, so dense attention over all keys is
    right on both sides of the edge.
    """
    world = needle_world()
    data = world.data[0][0]
    # the one key that no head of the indexer likes, and that no query attends to
    data.index_k[:] = 1
    data.index_k[3] = -1
    data.q[:, :, 0] = 60.0
    data.latent[:, 0] = 1.0
    data.latent[3, 0] = -1.0
    dense = Sizes(LENGTH)
    for position in (TOPK - 2, TOPK - 1, TOPK):
        start = {"prefill": 0, "chunk": position - 2, "decode": position}[kind]
        new = position + 1 - start
        world.remember(0, 0, start)
        step = world.run([(0 if kind == "decode" else new, start, new)])
        (row,) = positions(world, step.slots[0][-1:])
        assert (3 in row) == (position < TOPK)
        np.testing.assert_allclose(
            step.outputs[0][-1], data.attended(position, dense), rtol=0, atol=1e-5
        )
