"""Blocks have one owner, and all come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.engine.block_manager import BlockManager


@given(
    num_blocks=st.integers(1, 30),
    block_size=st.sampled_from([1, 4, 64]),
    actions=st.lists(
        st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 300))), max_size=60
    ),
)
def test_no_block_is_owned_twice_and_none_is_lost(num_blocks, block_size, actions):
    manager = BlockManager(num_blocks, block_size)
    tokens = dict.fromkeys("abcd", 0)
    for name, num_tokens in actions:
        before = {other: manager.blocks_of(other) for other in "abcd"}
        if num_tokens is None:
            manager.free(name)
            tokens[name] = 0
            assert manager.blocks_of(name) == ()
        else:
            added = manager.allocate(name, num_tokens)
            if added is None:
                assert manager.blocks_of(name) == before[name]
                needed = -(-num_tokens // block_size) - len(before[name])
                assert needed > manager.num_free
            else:
                tokens[name] = max(tokens[name], num_tokens)
                assert manager.blocks_of(name) == (*before[name], *added)
                assert len(manager.blocks_of(name)) == -(-tokens[name] // block_size)
        owned = [block for other in "abcd" for block in manager.blocks_of(other)]
        assert len(owned) == len(set(owned)) == manager.num_used
        assert set(owned) <= set(range(num_blocks))
        assert manager.num_used + manager.num_free == num_blocks
    for name in "abcd":
        manager.free(name)
    assert manager.num_free == num_blocks
    assert sorted(manager.allocate("all", num_blocks * block_size)) == list(range(num_blocks))


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 64), (4, 0)])
def test_sizes_below_one_are_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="num_blocks is"):
        BlockManager(num_blocks, block_size)
