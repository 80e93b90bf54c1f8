"""Evicted prefix blocks in host memory, over a fake runner whose tokens follow from its cache.

Random requests with late copies and failures: `tests/soak/test_host_tier.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.engine.block_keys import BlockKeys
from fd_dsa.engine.host_tier import HostTier
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.runner.block_store import HostBlockStore
from tests.engine.fakes import expected_greedy, make_engine, run_all

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
# four blocks of 4, and a token
PROMPTS = {token: [token] * 17 for token in (2, 3, 4, 5)}


class HeldStore(HostBlockStore):
    """Host memory whose copies count as done only when a test says so.

    Attributes:
        calls: what the engine asked for, in order.
        is_held: True while no copy is done.
    """

    overlaps = True

    def __init__(self, *arguments: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.is_held = True
        self._number = 0
        super().__init__(*arguments)

    @property
    def num_done(self) -> int:
        return 0 if self.is_held else self._number

    @num_done.setter
    def num_done(self, number: int) -> None:
        self._number = number

    def copy(self, loads: bool, block: int, slot: int, count: int) -> None:
        self.calls.append(("load" if loads else "save", block, slot, count))
        super().copy(loads, block, slot, count)

    def precede(self, number: int) -> None:
        self.calls.append(("precede", number))


def engine_with(num_slots, num_blocks=7, kind=HostBlockStore, num_ahead=0, **sizes):
    """An engine whose caches hold one prompt and a little more, and its store."""
    engine = make_engine(num_blocks=num_blocks, max_num_batched_tokens=32, **sizes)
    store = kind([engine.runner.cache], num_slots)
    engine.block_manager.use_host_tier(HostTier(store), num_ahead)
    return engine, store


def answer(engine, token, params=GREEDY):
    """Last output of a request alone, whose tokens must be right."""
    engine.add_request("r", PROMPTS[token], params)
    output = run_all(engine)["r"][-1]
    assert output.token_ids == expected_greedy(PROMPTS[token], params.max_tokens, eos=None)
    return output.num_cached_tokens, output.num_host_cached_tokens


def test_a_prompt_that_comes_back_is_copied_and_not_computed():
    engine, _ = engine_with(num_slots=20, max_model_len=28)
    assert [answer(engine, token) for token in (2, 3)] == [(0, 0)] * 2
    # two of four blocks of the first prompt were evicted for the second one
    assert answer(engine, 2) == (16, 8)
    engine.add_request("r", PROMPTS[3], GREEDY)
    engine.step()
    (row,) = engine.runner.steps[-1].values()
    assert row[:2] == (1, 16)
    run_all(engine)
    stats = engine.stats()
    assert stats.prefix_cache_hits == 32 and stats.prefix_cache_queries == 4 * 17
    assert 0 < stats.prefix_cache_host_hits < 32
    assert 0 < stats.host_cache_usage < 1


def test_other_salts_and_requests_that_compute_all_read_no_host_memory():
    engine, _ = engine_with(num_slots=20, max_model_len=28)
    for salt in ("a", "b"):
        params = replace(GREEDY, cache_salt=salt)
        assert [answer(engine, token, params) for token in (2, 3)] == [(0, 0)] * 2
    assert answer(engine, 2, replace(GREEDY, skip_reading_prefix_cache=True)) == (0, 0)
    assert answer(engine, 2, replace(GREEDY, cache_salt="a"))[1] > 0


def test_full_host_memory_drops_the_blocks_that_came_first():
    engine, _ = engine_with(num_slots=4, max_model_len=28)
    for token in PROMPTS:
        answer(engine, token)
    assert engine.stats().host_cache_usage == 1.0
    cached = [answer(engine, token)[1] for token in (4, 2)]
    assert cached[0] > 0 and cached[1] == 0


def test_outputs_of_one_request_share_what_was_copied():
    engine, _ = engine_with(num_slots=20, num_blocks=9, max_model_len=28)
    for token in (2, 3, 4):
        answer(engine, token)
    engine.add_request("r", PROMPTS[2], replace(GREEDY, n=2))
    outputs = [one for one in run_all(engine)["r"] if one.finished]
    expected = expected_greedy(PROMPTS[2], 3, eos=None)
    assert [one.token_ids for one in outputs] == [expected] * 2
    assert sorted((one.index, one.num_host_cached_tokens > 0) for one in outputs) == [
        (0, True), (1, False),
    ]  # fmt: skip


def test_logits_that_are_not_finite_empty_the_host_memory():
    engine, _ = engine_with(num_slots=20, max_model_len=28)
    answer(engine, 2)
    answer(engine, 3)
    assert engine.stats().host_cache_usage > 0
    engine.runner.nan_after = 4
    engine.add_request("fails", PROMPTS[4], GREEDY)
    assert run_all(engine)["fails"][-1].finish_reason == "error"
    engine.runner.nan_after = None
    assert engine.stats().host_cache_usage == 0
    assert answer(engine, 2) == (0, 0)


def two_turns():
    """An engine that runs a request while the blocks of another one are copied back."""
    engine, store = engine_with(12, num_blocks=12, kind=HeldStore, max_model_len=48)
    for token in PROMPTS:
        answer(engine, token)
    engine.add_request("runs", [9] * 5, replace(GREEDY, max_tokens=40))
    engine.step()
    store.calls.clear()
    engine.add_request("waits", PROMPTS[2], GREEDY)
    engine.step()
    assert any(call[0] == "load" for call in store.calls)
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 1)
    return engine, store


def test_others_run_until_the_copies_are_done():
    engine, store = two_turns()
    store.calls.clear()
    engine.step()
    # the running request needs no block that is copied
    assert store.calls == [] and engine.stats().num_waiting == 1
    store.is_held = False
    engine.step()
    assert engine.stats().num_running == 2
    assert store.calls[-1][0] == "precede"
    outputs = run_all(engine)
    assert outputs["waits"][-1].token_ids == expected_greedy(PROMPTS[2], 3, eos=None)
    assert outputs["waits"][-1].num_host_cached_tokens > 0
    assert outputs["runs"][-1].token_ids == expected_greedy([9] * 5, 40, eos=None)


def test_an_abort_in_the_middle_of_a_copy_gives_the_blocks_back():
    engine, store = two_turns()
    assert [one.finish_reason for one in engine.abort_request("waits")] == ["abort"]
    assert engine.stats().num_used_blocks == len(engine.block_manager.blocks_of(4))
    # blocks whose copies are in flight are read and written only after them
    engine.add_request("again", PROMPTS[3], GREEDY)
    engine.abort_request("runs")
    outputs = run_all(engine)
    assert outputs["again"][-1].token_ids == expected_greedy(PROMPTS[3], 3, eos=None)
    assert store.calls[-1][0] == "precede"


def test_a_running_request_takes_the_blocks_of_one_that_waits_for_copies():
    engine, store = two_turns()
    for _ in range(30):
        engine.step()
    assert engine.stats().num_preemptions == 0
    outputs = run_all(engine)
    assert outputs["runs"][-1].token_ids == expected_greedy([9] * 5, 40, eos=None)
    assert outputs["waits"][-1].token_ids == expected_greedy(PROMPTS[2], 3, eos=None)
    assert store.is_held and engine.stats().num_used_blocks == 0


def test_blocks_are_saved_before_their_eviction_and_neighbours_together():
    engine, store = engine_with(20, 12, HeldStore, num_ahead=9, max_model_len=28)
    answer(engine, 2)
    assert store.calls == []
    # seven blocks are free, and nine shall be
    engine.add_request("r", [9], replace(GREEDY, max_tokens=1))
    engine.step()
    (call,) = [call for call in store.calls if call[0] == "save"]
    assert call[3] == 2


@pytest.mark.parametrize("block_bytes", [1, 7])
def test_copies_of_neighbours_in_either_direction_are_one(block_bytes):
    cache = np.arange(12 * block_bytes, dtype=np.uint8).reshape(12, block_bytes)
    before, store = cache.copy(), HeldStore([cache], 8)
    tier, keys = HostTier(store), BlockKeys(list(range(12)), 1, None)
    for block in (5, 4, 3, 7, 9):
        tier.save(keys[block], block)
    tier.enqueue()
    assert [call[3] for call in store.calls] == [3, 1, 1]
    cache[:] = 0
    slots = tier.find(keys, 3, 12)
    assert len(slots) == 3
    tier.load(slots, [0, 1, 2])
    tier.enqueue()
    assert store.calls[-1][0] == "load" and store.calls[-1][3] == 3
    assert (cache[:3] == before[3:6]).all() and not cache[3:].any()
