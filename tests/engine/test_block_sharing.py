"""Keys of cache blocks and the order in which blocks are given away.

Random requests over shared blocks, every invariant recounted from the owners after each step:
`tests/soak/test_histories.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.engine.block_keys import BlockKeys
from fd_dsa.engine.block_manager import BlockManager


def keys(tokens, salt=None, block_size=2):
    """Keys of all full blocks."""
    return [
        BlockKeys(tokens, block_size, salt)[index] for index in range(len(tokens) // block_size)
    ]


def test_a_key_names_tokens_their_order_all_before_them_and_the_salt():
    lists = [[1, 2, 3, 4], [1, 2, 4, 3], [2, 1, 3, 4], [3, 4, 1, 2], [1, 2, 3, 2**40]]
    salts = [None, "a", "b", "ab", "\0" * 32]
    last = {(tuple(tokens), salt): keys(tokens, salt)[-1] for tokens in lists for salt in salts}
    assert len(set(last.values())) == len(lists) * len(salts)
    # the same two tokens, after others and first
    assert keys([3, 4])[0] != keys([1, 2, 3, 4])[1]
    # blocks of another size
    assert keys([1, 2, 3, 4], block_size=4)[0] not in keys([1, 2, 3, 4])


def test_keys_do_not_depend_on_when_they_are_asked_for():
    tokens = [5, 6, 7]
    growing = BlockKeys(tokens, 2, "salt")
    first = growing[0]
    tokens += [8, 9, 10]
    assert [growing[2], growing[1], growing[0]] == keys(tokens, "salt")[::-1]
    assert growing[0] is first, "hashed twice"


@pytest.mark.parametrize("num_prompt", range(7))
def test_keys_do_not_depend_on_where_the_prompt_ends(num_prompt):
    tokens = [5, 2**40, 7, 8, 9, 10]
    prompt_bytes = np.array(tokens[:num_prompt], np.int64).tobytes()
    split = BlockKeys(tokens, 2, "salt", prompt_bytes)
    assert [split[index] for index in range(3)] == keys(tokens, "salt")


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 64), (4, 0)])
def test_sizes_below_one_are_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="num_blocks is"):
        BlockManager(num_blocks, block_size)


def test_blocks_are_taken_when_enough_are_free_and_shared_ones_count_once():
    manager = BlockManager(6, 2)
    first = BlockKeys([1, 2, 3, 4, 5], 2, None)
    assert manager.allocate("first", 5) == [0, 1, 2]
    # with as many tokens as it has room for, nothing is added, however few are free
    assert manager.allocate("first", 6, spare=9) == []
    manager.cache_full_blocks("first", first, 5)
    assert manager.find_cached_blocks(first, 5) == [0, 1]
    assert manager.find_cached_blocks(first, 4) == [0]
    assert manager.allocate("second", 8, [0, 1], spare=2) is None
    assert manager.blocks_of("second") == ()
    assert manager.allocate("second", 8, [0, 1], spare=1) == [0, 1, 3, 4]
    assert (manager.num_used, manager.num_free) == (5, 1)
    manager.free("first")
    manager.free("first")
    assert manager.num_used == 4
    manager.free("second")
    # 0 and 1 are kept; a request that revives them needs as many free blocks as any other
    assert manager.allocate("third", 12, [0, 1], spare=1) is None
    # blocks of no use are taken before those that can be found, of these the last of a request
    assert manager.allocate("fourth", 10)[-1] == 1
    assert manager.find_cached_blocks(first, 5) == [0]


def test_after_a_reset_nothing_of_before_is_found_nor_what_present_requests_compute():
    manager = BlockManager(4, 2)
    done, runs = (BlockKeys([first, 2, 3, 4], 2, None) for first in (1, 5))
    manager.allocate("done", 4)
    manager.cache_full_blocks("done", done, 4)
    manager.free("done")
    manager.allocate("runs", 4)
    manager.reset_prefix_cache()
    manager.cache_full_blocks("runs", runs, 4)
    assert manager.find_cached_blocks(done, 5) == manager.find_cached_blocks(runs, 5) == []
    manager.free("runs")
    assert sorted(manager.allocate("all", 8)) == [0, 1, 2, 3]
