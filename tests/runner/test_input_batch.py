"""InputBatch: what rows leave in the fixed buffers, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.errors import CapacityError
from fd_dsa.runner import InputBatch
from tests.runner.following import Follower, all_of


@given(st.data())
def test_steps_of_any_rows(data: st.DataObject) -> None:
    batch = InputBatch(6, 64, 2, 16)
    for _ in range(2):
        batch.begin_step()
        rows = sorted(data.draw(st.sets(st.integers(0, 5))))
        ids: list[int] = []
        lengths = np.zeros((6, 3), int)
        for row in rows:
            new = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=8))
            cached, prefill = data.draw(st.integers(0, 20)), data.draw(st.booleans())
            ids += new
            assert batch.add_row(row, new, cached, prefill) == len(ids) - 1
            lengths[row] = (len(new) if prefill else 0, cached, len(new))
        assert batch.token_ids[: batch.num_tokens].tolist() == ids
        found = (batch.num_chunk_tokens, batch.num_computed_tokens, batch.num_scheduled_tokens)
        np.testing.assert_array_equal(np.stack(found, axis=1), lengths)
        assert batch.num_prefill_tokens == lengths[:, 0].sum()
        assert batch.max_seqlen_k == (lengths[:, 1] + lengths[:, 2]).max()
        assert batch.num_rows == (rows[-1] + 1 if rows else 0)


def test_a_new_step_keeps_blocks_and_addresses() -> None:
    batch = InputBatch(3, 8, 4, 16)
    addresses = [a.ctypes.data for a in vars(batch).values() if isinstance(a, np.ndarray)]
    batch.set_blocks(1, [4, 5])
    batch.set_blocks(1, [9], start=2)
    batch.add_row(1, [3], 32, is_prefill=False)
    batch.begin_step()
    assert all_of(batch) == all_of(InputBatch(3, 8, 4, 16)) | {
        "block_tables": [[-1] * 4, [4, 5, 9, -1], [-1] * 4]
    }
    assert addresses == [a.ctypes.data for a in vars(batch).values() if isinstance(a, np.ndarray)]
    batch.clear_row(1)
    assert (batch.block_tables == -1).all()


REFUSED = {
    "row before": ("row", (1, [3], 0, True), ValueError, r"rows: \[1\] must ascend from 2 on"),
    "row past": ("row", (4, [3], 0, True), ValueError, "stay below max_num_seqs 4"),
    "no token": ("row", (2, [], 0, True), ValueError, "row 2 has no token"),
    "id": ("row", (2, [5, -1], 0, True), ValueError, "row 2 has the id -1; ids are at least 0"),
    "tokens": ("row", (2, [1, 2, 3], 0, True), CapacityError, "rows 2 to 2 .* 5 tokens.*is 4"),
    "rows before": ("rows", ([1, 3], [1, 1], [3, 3], [5, 5], [0, 0]), ValueError, "must .* from 2"),
    "descend": ("rows", ([3, 2], [1, 1], [3, 3], [5, 5], [0, 0]), ValueError, r"\[3, 2\] must"),
    "repeat": ("rows", ([2, 2], [1, 1], [3, 3], [5, 5], [0, 0]), ValueError, r"\[2, 2\] must"),
    "rows past": ("rows", ([2, 4], [1, 1], [3, 3], [5, 5], [0, 0]), ValueError, "stay below"),
    "empty": ("rows", ([2, 3], [2, 0], [3, 3], [5, 5], [0, 0]), ValueError, "row 3 has no token"),
    "many": ("rows", ([2, 3], [1, 2], [3] * 3, [5, 5], [0, 0]), CapacityError, "to 3 .* 5 tok.*4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_rows_change_nothing(name: str) -> None:
    method, arguments, error, message = REFUSED[name]
    batch = InputBatch(4, 4, 2, 16)
    batch.add_row(1, [6, 7], 3, is_prefill=True)
    before = all_of(batch)
    with pytest.raises(error, match=message):
        getattr(batch, f"add_{method}")(*arguments)
    assert all_of(batch) == before


def test_more_blocks_than_a_row_holds() -> None:
    batch = InputBatch(2, 4, 3, 16)
    with pytest.raises(CapacityError, match="row 1 needs 4 blocks, a row holds 3"):
        batch.set_blocks(1, [7, 8], start=2)
    assert (batch.block_tables == -1).all()


def test_rows_are_those_of_add_row() -> None:
    both = [InputBatch(6, 7, 4, 16) for _ in range(2)]
    rows, ids, cached, prompts = [1, 2, 5], [[7], [0, 3], [9, 8]], [16, 3, 40], [False, False, True]
    for batch in both:
        batch.begin_step()
        batch.add_row(0, [4, 4], 8, is_prefill=True)
    both[0].add_rows(rows, [1, 2, 2], [7, 0, 3, 9, 8], cached, prompts)
    given = zip(rows, ids, cached, prompts, strict=True)
    assert [both[1].add_row(*row) for row in given] == [2, 4, 6]
    assert all_of(both[0]) == all_of(both[1])


def test_a_step_is_restored_in_another_process() -> None:
    batch = InputBatch(4, 8, 4, 4)
    follower = Follower(batch)
    batch.set_blocks(1, [5, 6])
    batch.add_rows([1, 2], [3, 2], [0, 7, 3, 4, 5], [5, 0], [False, True], {0: 2, 1: 8})
    batch.pending_source[1] = 3
    batch.snapshot_slots[2] = 7
    batch.next_prompt_tokens[4] = 6
    follower.follow()
    for one in (follower.batch, batch):
        assert one.block_tables[1].tolist() == [5, 6, -1, -1]
        assert one.pending_source.tolist() == [-1, 3, -1, -1]
        assert one.snapshot_slots.tolist() == [-1, -1, 7, -1]
        assert one.staged_ids().tolist() == [-3, -9, 3, 4, 5]
        assert one.next_tokens([0, 1, 2], 10).tolist() == [-11, -12, -13, 5, 6]


@given(st.data())
def test_a_batch_that_follows_all_steps_stays_equal(data: st.DataObject) -> None:
    batch, lengths = InputBatch(3, 8, 6, 4), [0] * 3
    batch.set_blocks(0, [8, 9])
    follower = Follower(batch)
    for _ in range(data.draw(st.integers(1, 8))):
        batch.begin_step()
        for row in data.draw(st.lists(st.integers(0, 2), max_size=6)):
            if data.draw(st.booleans()):
                # a row ends, or another request gets it
                batch.clear_row(row)
                lengths[row] = 0
            blocks = data.draw(st.lists(st.integers(0, 99), max_size=6 - lengths[row]))
            batch.set_blocks(row, blocks, lengths[row])
            lengths[row] += len(blocks)
        for row in sorted(data.draw(st.sets(st.integers(0, 2)))):
            batch.add_row(row, [7], data.draw(st.integers(0, 20)), is_prefill=False)
        follower.follow(is_sent_again=data.draw(st.booleans()))


def test_a_message_has_only_the_changed_blocks() -> None:
    """One table alone would take two kilobytes."""
    batch, rows = InputBatch(128, 256, 512, 64), range(128)
    follower = Follower(batch)
    for row in rows:
        batch.set_blocks(row, [row] * 511)
    batch.add_rows(rows, [1] * 128, [7] * 128, [32703] * 128, [False] * 128)
    assert follower.follow() > 128 * 511
    batch.begin_step()
    batch.set_blocks(5, [300], 511)
    batch.add_rows(rows, [1] * 128, [7] * 128, [32704] * 128, [False] * 128)
    assert follower.follow() < 5000


def test_block_tables_change_only_by_methods_that_note_it() -> None:
    batch = InputBatch(2, 8, 4, 16)
    with pytest.raises(ValueError, match="read-only"):
        batch.block_tables[1, 2] = 3


def test_pending_tokens_are_staged_by_their_index() -> None:
    batch = InputBatch(4, 8, 4, 16)
    batch.add_rows([0], [2], [3, 4], [0], [True])
    assert batch.staged_ids().tolist() == [3, 4]
    batch.add_rows([1, 3], [1, 2], [0, 5, 0], [8, 9], [False, False], {0: 2, 2: 8})
    assert batch.token_ids[:5].tolist() == [3, 4, 0, 5, 0]
    assert batch.pending[:5].tolist() == [-1, -1, 2, -1, 8]
    assert batch.staged_ids().tolist() == [3, 4, -3, 5, -9]
    batch.next_prompt_tokens[1] = 6
    # the token after a pending one of the same row may be pending itself
    assert batch.next_tokens()[[0, 1, 3]].tolist() == [4, 6, -9]
    assert batch.next_tokens([2, 3, 4], 10).tolist() == [4, 6, -11, -12, -13]
    assert batch.next_tokens(range(5), 10).tolist() == [-11, -12, -13, -14, -15]
    batch.begin_step()
    batch.add_rows([0], [3], [1, 2, 3], [0], [False])
    assert batch.staged_ids().tolist() == [1, 2, 3]
