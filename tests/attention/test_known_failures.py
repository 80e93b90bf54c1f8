"""Failures that other DSA engines have had, each as a test of the selected indices.

Sources: mlx-lm #1189, pypto-lib #592 (later chunks score their own chunk only), mlx-lm #1454 (only
trailing keys), mlx-lm #1443 (collapse at index_topk), vLLM's gather for DeepSeek-V4 (a buffer that
was never written, read past the count), SGLang #34718 (pages that a row does not have).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fd_dsa.attention.host as host_module
import fd_dsa.ops.logits.paddle_impl as scoring
from fd_dsa.attention.step_plan import StepPlan
from fd_dsa.ops.logits.paddle_impl import PagedUnits
from fd_dsa.ops.topk.paddle_impl import positions_to_slots
from tests.attention.harness import Sizes, World, rows_of, world_of
from tests.reference.topk import ref_slot
from tests.strategies import make_batch

TOPK, LENGTH, NEEDLE = 8, 120, 5
HUGE = 2**31 - 1
# longer than any selection and any tile of scores
MANY, MIDDLE = 140_000, 70_001


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


def test_indices_are_not_all_trailing() -> None:
    """With scores that prefer the first keys, the last tokens select the first positions."""
    world = needle_world()
    data = world.data[0][0]
    data.index_k[:] = 1
    data.index_k[:TOPK] = 2
    found = positions(world, world.run([(LENGTH, 0, LENGTH)]).slots[0])
    for row in found[TOPK:]:
        assert row == list(range(TOPK))


def choose(world: World, rows: list[tuple[int, int, int]]) -> Any:
    """The selection of a step, in the memory that the backend uses for the next one too."""
    meta = world.begin(rows)
    names = ("latent", "k_pe", "index_q", "index_k", "weights")
    given = {name: world.packed(0, rows, 0, name) for name in names}
    world.write(given, 0, meta)
    return world.backend.select(given["index_q"], given["weights"], 0, meta)


def check_counts(world: World) -> None:
    """A short prompt, chosen in memory that a longer step has left full of huge numbers."""
    np.from_dlpack(choose(world, [(LENGTH, 0, LENGTH)]))[...] = HUGE
    slots = choose(world, [(20, 0, 20)]).numpy()
    np.from_dlpack(choose(world, [(LENGTH, 0, LENGTH)]))[...] = HUGE
    decoded = choose(world, [(0, 3, 1)]).numpy()
    found = [*positions(world, slots), *positions(world, decoded)]
    for position, row in zip([*range(20), 3], found, strict=True):
        count = min(position + 1, TOPK)
        assert row[count:] == [-1] * (len(row) - count)
        assert row[:count] == sorted(set(row[:count]))
        assert all(0 <= p <= position for p in row[:count])


def test_nothing_but_minus_one_past_the_count() -> None:
    check_counts(needle_world())


def test_a_buffer_written_in_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_valid_ones_alone(plan: StepPlan) -> None:
        places = np.arange(plan.topk)[None, :] + np.zeros((plan.num_tokens, 1), np.int32)
        known = np.minimum(places, plan.window[:, None] - 1).astype(np.int32)
        slots = positions_to_slots(known, plan.batch_ids, plan.block_tables, plan.block_size)
        valid = places < plan.window[:, None]
        plan.slots[: plan.num_tokens][valid] = slots[valid]

    monkeypatch.setattr(StepPlan, "_fill_slots", fill_valid_ones_alone)
    with pytest.raises((AssertionError, KeyError)):
        check_counts(needle_world())


@pytest.fixture(scope="module")
def many() -> World:
    """A row of many keys, one of which all queries look for; all but the last are in the cache."""
    world = needle_world(length=MANY)
    data = world.data[0][0]
    data.index_k[NEEDLE], data.index_k[MIDDLE] = 0, 4
    world.remember(0, 0, MANY)
    return world


def last_selections(world: World) -> list[list[int]]:
    """What the last tokens of many attend to, as a chunk of a prompt and decoded."""
    table = np.arange(MANY)
    blocks, offsets = np.divmod(table, 16)
    place = np.full(world.num_blocks * 16, -1)
    place[world.tables[0][blocks].astype(np.int64) * 16 + offsets] = table
    steps = [choose(world, [(n, MANY - 3, 3)]).numpy() for n in (3, 0)]
    return [place[row].tolist() for step in steps for row in step]


def test_one_of_many_keys_is_found(many: World) -> None:
    for row in last_selections(many):
        assert MIDDLE in row
        assert min(row) < MANY // 2, "only trailing keys"


@pytest.mark.parametrize("scores", [np.zeros_like, lambda s: np.arange(s.size).reshape(s.shape)])
def test_scores_that_are_lost_are_noticed(
    many: World, monkeypatch: pytest.MonkeyPatch, scores: Any
) -> None:
    """All zero, and growing with the position: the first keys alone, and the last ones alone."""
    for name in ("score_gathered", "score_paged"):
        right = getattr(host_module, name)
        monkeypatch.setattr(
            host_module,
            name,
            lambda *given, right=right: scores(right(*given)).astype(np.float32),
        )
    assert not any(MIDDLE in row for row in last_selections(many))


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


# rows of unequal lengths: the table of a shorter one has a tail without blocks
UNEQUAL = [(0, 299, 1), (0, 17, 1), (0, 40, 1), (9, 30, 9)]


def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of the index cache that decoding reads from now on."""
    read: list[int] = []
    right = scoring.gather_index_blocks

    def watching(blocks: Any, index: np.ndarray, *others: Any) -> Any:
        read.extend(index.ravel().tolist())
        return right(blocks, index, *others)

    monkeypatch.setattr(scoring, "gather_index_blocks", watching)
    return read


def run_unequal(monkeypatch: pytest.MonkeyPatch) -> tuple[set[int], set[int], World]:
    """Blocks that a step of unequal rows read, those that its rows own, and its world."""
    batch = make_batch(UNEQUAL, 16)
    assert (batch.block_tables < 0).any()
    world = world_of(batch, Sizes(TOPK, 16))
    read = blocks_read(monkeypatch)
    world.check(rows_of(batch), world.run(rows_of(batch)))
    owned = {int(block) for block in batch.block_tables.ravel() if block >= 0}
    return set(read), owned, world


def test_no_page_is_read_that_a_row_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    read, owned, world = run_unequal(monkeypatch)
    # block 0 stands where a row has ended; it is in every cache
    assert read <= owned | {0} and max(read) < world.num_blocks


def test_an_unmapped_tail_that_is_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PagedUnits.build.__func__  # type: ignore[attr-defined]

    def unmasked(cls: Any, lengths: np.ndarray, tables: np.ndarray, block_size: int) -> Any:
        # every row as long as the longest one
        return right(cls, np.full_like(lengths, lengths.max()), tables, block_size)

    monkeypatch.setattr(PagedUnits, "build", classmethod(unmasked))
    read, owned, _ = run_unequal(monkeypatch)
    assert not read <= owned | {0}
