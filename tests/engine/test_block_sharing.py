"""Shared cache blocks against a model that keeps whole token lists and recounts owners."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from fd_dsa.engine.block_manager import BlockKeys, BlockManager

# most requests share, some do not, and some part in the middle of a block
SALTS = [None, None, None, "a"]
STEM = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0]
PROMPTS = st.builds(
    lambda length, tail: STEM[:length] + tail,
    st.integers(1, len(STEM)),
    st.lists(st.integers(0, 1), max_size=2),
)


class NaiveRequest:
    """What a request knows of itself."""

    def __init__(self, name, tokens, salt, block_size):
        self.name = name
        self.tokens = list(tokens)
        self.salt = salt
        self.keys = BlockKeys(self.tokens, block_size, salt)
        self.blocks = []
        self.num_computed = 0
        # full blocks that have been offered for sharing, each once; None after a reset: what it
        # computes later is not to be found
        self.num_offered = 0

    def beginning(self, index, block_size):
        """Name of what block `index` must hold: the salt and all tokens to its end."""
        return self.salt, tuple(self.tokens[: (index + 1) * block_size])


class BlockSharing(RuleBasedStateMachine):
    """Random requests; `memory` is a cache that remembers all that a block was computed from."""

    requests = Bundle("requests")

    @initialize(num_blocks=st.integers(1, 9), block_size=st.integers(1, 3))
    def begin(self, num_blocks, block_size):
        self.manager = BlockManager(num_blocks, block_size)
        self.size = block_size
        self.running: dict[str, NaiveRequest] = {}
        self.count = 0
        # block -> what it holds; only full blocks
        self.memory = {}
        # beginning -> block, and the blocks of it without an owner in the order of their release
        self.table = {}
        self.unowned = []

    def owners(self, block):
        return sum(request.blocks.count(block) for request in self.running.values())

    def beginnings(self, tokens, salt, num_blocks):
        """Names of the first blocks of a list of tokens."""
        return [(salt, tuple(tokens[: (i + 1) * self.size])) for i in range(num_blocks)]

    def longest_hit(self, tokens, salt):
        """Blocks that a prompt may take over: full ones, and never with its last token."""
        hit = []
        for beginning in self.beginnings(tokens, salt, (len(tokens) - 1) // self.size):
            if beginning not in self.table:
                break
            hit.append(self.table[beginning])
        return hit

    def take(self, request, blocks):
        """Follow an allocation: blocks out of use first, then the longest unowned, none in use."""
        num_idle = self.manager.num_blocks - len(set(self.memory_in_use()) | set(self.unowned))
        for block in blocks:
            assert self.owners(block) == 0
            if num_idle:
                assert block not in self.unowned
                num_idle -= 1
            else:
                assert block == self.unowned.pop(0)
                self.table = {key: value for key, value in self.table.items() if value != block}
            self.memory.pop(block, None)
            request.blocks.append(block)

    def memory_in_use(self):
        return [block for request in self.running.values() for block in request.blocks]

    @rule(
        target=requests,
        tokens=PROMPTS,
        salt=st.sampled_from(SALTS),
        reads=st.sampled_from([True, True, False]),
        spare=st.sampled_from([0, 0, 1, 2]),
        num_computed=st.integers(0, 14),
    )
    def start(self, tokens, salt, reads, spare, num_computed):
        """Admit a request, with the blocks that are there, if it fits; run some of its tokens."""
        request = NaiveRequest(str(self.count), tokens, salt, self.size)
        self.count += 1
        hit = self.manager.find_cached_blocks(request.keys, len(tokens)) if reads else []
        assert hit == (self.longest_hit(tokens, salt) if reads else [])
        for index, block in enumerate(hit):
            assert self.memory[block] == request.beginning(index, self.size)
        num_new = -(-len(tokens) // self.size) - len(hit)
        num_free = self.manager.num_free - sum(block in self.unowned for block in hit)
        added = self.manager.allocate(request.name, len(tokens), hit, spare)
        assert (added is None) == (num_new + spare > num_free)
        if added is None:
            assert self.manager.blocks_of(request.name) == ()
            return multiple()
        self.running[request.name] = request
        assert added[: len(hit)] == hit
        request.blocks += hit
        self.unowned = [block for block in self.unowned if block not in hit]
        self.take(request, added[len(hit) :])
        request.num_computed = len(hit) * self.size
        request.num_offered = len(hit)
        self.compute(request.name, num_computed, finishes=True)
        return request.name

    @rule(name=requests, num_tokens=st.integers(1, 6), finishes=st.booleans())
    def compute(self, name, num_tokens, finishes):
        """Run some tokens of a request; a step that fails writes them, and they do not count."""
        request = self.running.get(name)
        if request is None:
            return
        begin = request.num_computed
        end = min(begin + num_tokens, len(request.tokens))
        for position in range(begin, end):
            block = request.blocks[position // self.size]
            assert self.owners(block) == 1, "a shared block is written"
            assert block not in self.table.values(), "a block that can be found is written"
            if (position + 1) % self.size == 0:
                self.memory[block] = request.beginning(position // self.size, self.size)
        if not finishes:
            return
        request.num_computed = end
        self.manager.cache_full_blocks(name, request.keys, end)
        if request.num_offered is not None:
            for index in range(request.num_offered, end // self.size):
                beginning = request.beginning(index, self.size)
                self.table.setdefault(beginning, request.blocks[index])
            request.num_offered = max(request.num_offered, end // self.size)

    @rule(name=requests, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def grow(self, name, tokens):
        """Append sampled tokens where blocks for them are free."""
        request = self.running.get(name)
        if request is None:
            return
        num_tokens = len(request.tokens) + len(tokens)
        missing = -(-num_tokens // self.size) - len(request.blocks)
        num_free = self.manager.num_free
        added = self.manager.allocate(name, num_tokens)
        assert (added is None) == (missing > num_free)
        if added is not None:
            assert len(added) == max(missing, 0)
            request.tokens += tokens
            self.take(request, added)

    @rule(name=consumes(requests))
    def end(self, name):
        """End, abort or preempt a request: all of them give the blocks back."""
        request = self.running.pop(name, None)
        self.manager.free(name)
        assert self.manager.blocks_of(name) == ()
        for block in reversed(request.blocks if request else []):
            if self.owners(block) == 0 and block in self.table.values():
                self.unowned.append(block)

    @rule()
    def reset(self):
        """Nothing of before may be found, not even what present requests go on to compute."""
        self.manager.reset_prefix_cache()
        self.table, self.unowned = {}, []
        for request in self.running.values():
            request.num_offered = None

    @invariant()
    def blocks_add_up(self):
        if not hasattr(self, "manager"):
            return
        used = set()
        for request in self.running.values():
            assert self.manager.blocks_of(request.name) == tuple(request.blocks)
            assert len(set(request.blocks)) == len(request.blocks)
            used.update(request.blocks)
        assert self.manager.num_used == len(used)
        assert self.manager.num_used + self.manager.num_free == self.manager.num_blocks
        assert set(self.unowned).isdisjoint(used)
        for beginning, block in self.table.items():
            assert self.memory[block] == beginning
        for block in used:
            if self.owners(block) > 1:
                assert block in self.memory, "a block is shared that was never filled"

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        for name in self.running:
            self.manager.free(name)
        num_blocks = self.manager.num_blocks
        assert self.manager.num_free == num_blocks
        blocks = self.manager.allocate("all", num_blocks * self.size)
        assert sorted(blocks) == list(range(num_blocks))


TestBlockSharing = BlockSharing.TestCase
TestBlockSharing.settings = settings(max_examples=60, stateful_step_count=40)


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


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 64), (4, 0)])
def test_sizes_below_one_are_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="num_blocks is"):
        BlockManager(num_blocks, block_size)
