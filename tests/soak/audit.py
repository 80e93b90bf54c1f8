"""Invariants of scheduler and block manager after every step, recounted from the owners.

The only test that looks inside them: an invariant that their own figures showed would be worth
no more than the figures.
"""

from __future__ import annotations

from collections import Counter

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.request import Request


def running_requests(engine: LLMEngine) -> dict[int, Request]:
    """Requests with a row, by row."""
    return {request.batch_row: request for request in engine.scheduler.running.values()}


def waiting_requests(engine: LLMEngine) -> list[Request]:
    """Requests without a row, in the order in which they will get one."""
    return list(engine.scheduler.waiting)


def evictable_keys(engine: LLMEngine) -> set[bytes]:
    """Keys by which blocks can be found."""
    return set(engine.block_manager._block_of)


def audit(engine: LLMEngine) -> None:
    """AssertionError naming the block or request that breaks a rule."""
    _audit_blocks(engine)
    _audit_rows(engine)


def _audit_blocks(engine: LLMEngine) -> None:
    """Each block is free, kept or owned, and owners are counted right."""
    blocks = engine.block_manager
    owners: Counter[int] = Counter()
    for name, owner in blocks._owners.items():
        assert len(set(owner.blocks)) == len(owner.blocks), f"{name} owns a block twice"
        owners.update(owner.blocks)
    for block, count in enumerate(blocks._num_owners):
        assert count == owners[block], f"block {block} has {owners[block]} owners, counted {count}"
    free, kept = blocks._free, blocks._saved | blocks._unowned
    assert len(kept) == len(blocks._saved) + len(blocks._unowned), "a kept block is there twice"
    assert len(set(free)) == len(free), "a block is free twice"
    parts = (set(free), set(kept), set(owners))
    assert sum(map(len, parts)) == blocks.num_blocks, f"blocks are lost or in two places: {parts}"
    assert set().union(*parts) == set(range(blocks.num_blocks))
    assert {block: key for key, block in blocks._block_of.items()} == blocks._key_of
    assert kept.keys() <= blocks._key_of.keys(), "a kept block cannot be found"
    assert not parts[0] & blocks._key_of.keys(), "a free block can be found"
    if blocks.tier is not None:
        slots = [*blocks.tier._free, *blocks.tier._slot_of.values()]
        assert sorted(slots) == list(range(blocks.tier._store.num_slots)), "a slot is lost"
    salts: dict[int, str | None] = {}
    for request in running_requests(engine).values():
        for block in blocks.blocks_of(request.seq_id):
            salt = request.params.cache_salt
            assert salts.setdefault(block, salt) == salt, f"block {block} crosses cache salts"


def _audit_rows(engine: LLMEngine) -> None:
    """Rows are those of the running requests, which own what their tokens need."""
    blocks, batch = engine.block_manager, engine.runner.input_batch
    running = running_requests(engine)
    assert len(running) == engine.scheduler.num_running <= batch.max_num_seqs
    free = engine.scheduler.free_rows
    assert sorted([*free, *running]) == list(range(batch.max_num_seqs)), "a row is lost"
    for row in range(batch.max_num_seqs):
        owned = blocks.blocks_of(running[row].seq_id) if row in running else ()
        table = batch.block_tables[row]
        assert tuple(table[: len(owned)].tolist()) == owned, f"row {row} shows other blocks"
        assert (table[len(owned) :] == -1).all(), f"row {row} shows blocks it does not own"
    names = {request.seq_id for request in running.values()}
    waiting = {request.seq_id for request in waiting_requests(engine)}
    assert blocks.reservations.keys() <= waiting, "a request that does not wait has reserved blocks"
    names |= blocks.reservations.keys()
    assert blocks._owners.keys() <= names, "a request without a row owns blocks"
    arrivals = [request.seq_id for request in engine.scheduler.running.values()]
    arrivals += [request.seq_id for request in waiting_requests(engine)]
    assert arrivals == sorted(set(arrivals)), f"served out of order: {arrivals}"
