"""Failures that other DSA engines have had, each as a test of the selected indices.

Sources: mlx-lm #1454 (only trailing keys of a long row), SGLang #34718 (pages that a row does not
have). Those of chunks, of counts and of the edge at index_topk are any step's, and those of
`test_backend_against_loops.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fd_dsa.ops.logits.host_scores as scoring
from tests.attention.harness import Sizes, World, rows_of, world_of
from tests.strategies import make_batch

TOPK = 8
# longer than any selection and any tile of scores
MANY, MIDDLE = 140_000, 70_001


@pytest.mark.parametrize("new", [3, 0], ids=["chunk", "decode"])
def test_one_of_many_keys_is_found(new: int) -> None:
    """All queries look for one key, which is in the cache as all but the last three are."""
    batch = make_batch([(MANY, 0, MANY)], 16)
    world = World(Sizes(TOPK, 16), batch.block_tables, [MANY], batch.num_blocks, MANY)
    data = world.data[0][0]
    data.index_q[:] = data.weights[:] = 1
    data.index_k[:] = np.random.default_rng(0).integers(-2, 2, data.index_k.shape)
    data.index_k[MIDDLE] = 4
    world.remember(0, 0, MANY)
    places = np.full(world.num_blocks * 16, -1)
    blocks, offsets = np.divmod(np.arange(MANY), 16)
    places[world.tables[0][blocks].astype(np.int64) * 16 + offsets] = np.arange(MANY)
    for row in places[world.run([(new, MANY - 3, 3)]).slots[0]]:
        assert MIDDLE in row
        assert row.min() < MANY // 2, "only trailing keys"


# rows of unequal lengths: the table of a shorter one has a tail without blocks
UNEQUAL = [(0, 299, 1), (0, 17, 1), (0, 40, 1), (9, 30, 9)]


def test_no_page_is_read_that_a_row_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, read = make_batch(UNEQUAL, 16), set[int]()
    right = scoring.gather_index_blocks

    def watching(blocks: Any, index: np.ndarray, *others: Any) -> Any:
        read.update(index.ravel().tolist())
        return right(blocks, index, *others)

    monkeypatch.setattr(scoring, "gather_index_blocks", watching)
    world = world_of(batch, Sizes(TOPK, 16))
    world.check(rows_of(batch), world.run(rows_of(batch)))
    owned = set(batch.block_tables[batch.block_tables >= 0].tolist())
    # block 0 stands where a row has ended; it is in every cache
    assert read and read <= owned | {0} and max(read) < world.num_blocks
