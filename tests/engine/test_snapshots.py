"""Prefix caching of rows with a state in addition to blocks, over a runner that checks it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from fd_dsa.engine.block_keys import BlockKeys
from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.snapshots import Snapshots
from fd_dsa.runner.input_batch import NO_SLOT
from tests.engine.fakes import FakeRunner, expected_greedy, make_engine, run_all

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PREFIX = [5, 9, 2, 31, 17, 8, 8, 20, 3, 12, 30, 6, 7, 25, 11, 4, 19, 22]


class StatefulRunner(FakeRunner):
    """Keeps the tokens of each row beside the cache, and refuses to go on after other ones."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.states: dict[int, list[int]] = {}
        # steps before one that finds no memory after its first layers
        self.failing = -1

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Check the state of each row against its blocks, and add the tokens of the step."""
        self.failing -= 1
        if self.failing == -1:
            rows = np.flatnonzero(self.input_batch.num_chunk_tokens).tolist()
            slots = self.input_batch.snapshot_slots
            self.states |= {place: [-1] for place in (*rows, *slots[slots != NO_SLOT].tolist())}
            raise MemoryError("no memory")
        logits, batch, begin = super().execute_model(logits_indices), self.input_batch, 0
        for row, (new, before, _) in self.steps[-1].items():
            table = batch.block_tables[row]
            known = self.cache[table[table >= 0]].reshape(-1)[:before].tolist()
            state = self.states.get(row, []) if before else []
            assert state == known, f"row {row} goes on after tokens of another row"
            tokens = batch.token_ids[begin : begin + new].tolist()
            if (slot := batch.snapshot_slots[row]) != NO_SLOT:
                copied = self.states[slot] if before else []
                assert copied == known, f"the snapshot of row {row} lacks tokens before the step"
                end = (before + new - 1) // batch.block_size * batch.block_size
                assert end > before, f"no block of row {row} ends in the step"
                self.states[slot] = known + tokens[: end - before]
            self.states[row] = state + tokens
            begin += new
        return logits

    def copy(self, source: int, target: int) -> None:
        """Copy a state."""
        self.states[target] = self.states[source]


def stateful_engine(num_snapshots: int = 8, **sizes: Any) -> Any:
    """An engine whose rows have states, without snapshots if requests share no prefixes."""
    engine = make_engine(**sizes, enable_prefix_caching=num_snapshots > 0)
    manager = engine.block_manager
    engine.runner = runner = StatefulRunner(engine.runner.input_batch, manager.num_blocks)
    manager.shares_blocks = False
    slots = range(100, 100 + num_snapshots)
    if num_snapshots:
        manager.snapshots = Snapshots(slots, runner.copy, manager.block_size)
    return engine


def answer(engine: Any, prompt: list[int], params: SamplingParams = GREEDY) -> Any:
    """Last output of a request that has the engine for itself."""
    engine.add_request("r", prompt, params)
    output = run_all(engine)["r"][-1]
    assert output.token_ids == expected_greedy(prompt, params.max_tokens, eos=None)
    return output


@pytest.mark.parametrize("budget", [3, 6, 16])
def test_a_prompt_goes_on_after_its_last_block(budget: int) -> None:
    engine = stateful_engine(max_num_batched_tokens=budget)
    assert [answer(engine, PREFIX).num_cached_tokens for _ in range(2)] == [0, 16]
    # an answer too
    longer = PREFIX + expected_greedy(PREFIX, 6, eos=None)
    assert answer(engine, [*longer, 3]).num_cached_tokens == 20


def test_a_prompt_that_fits_takes_one_step() -> None:
    engine = stateful_engine(max_num_batched_tokens=20)
    for cached in (0, 16):
        assert answer(engine, PREFIX).num_cached_tokens == cached
        prompt_step, *steps = engine.runner.steps
        assert list(prompt_step.values()) == [(18 - cached, cached, True)]
        assert len(steps) == 5
        engine.runner.steps.clear()


def test_one_of_two_prompts_of_a_step_gets_the_only_snapshot() -> None:
    engine = stateful_engine(num_snapshots=1, max_num_batched_tokens=40)
    prompts = [PREFIX, PREFIX[::-1]]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, GREEDY)
    outputs = run_all(engine)
    for number, prompt in enumerate(prompts):
        assert outputs[str(number)][-1].token_ids == expected_greedy(prompt, 6, eos=None)
    assert len(engine.runner.steps[0]) == 2


@pytest.mark.parametrize("num_snapshots", [0, 1, 8])
@pytest.mark.parametrize("failing", [0, 1, 2, 3, 4])
def test_a_step_without_memory_changes_no_token(failing: int, num_snapshots: int) -> None:
    """Its rows have keys of tokens that the next step computes again, or leaves for later."""
    engine = stateful_engine(num_snapshots, max_num_batched_tokens=10)
    engine.runner.failing = failing
    prompts = [PREFIX, [3, *PREFIX], [*PREFIX[:9], 2]]
    for _ in range(2):
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, GREEDY)
        outputs = run_all(engine)
        for number, prompt in enumerate(prompts):
            assert outputs[str(number)][-1].token_ids == expected_greedy(prompt, 6, eos=None)
    assert engine.runner.failing < 0


def test_a_common_beginning_is_found_by_the_third_request() -> None:
    engine = stateful_engine()
    found = [answer(engine, [*PREFIX[:10], *[last] * 9]).num_cached_tokens for last in (1, 2, 3)]
    assert found == [0, 0, 8]


def test_outputs_of_a_request_share_its_prompt() -> None:
    engine = stateful_engine()
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, n=3)
    engine.add_request("r", PREFIX, params)
    outputs = run_all(engine)["r"]
    last = {output.index: output.token_ids for output in outputs}
    assert [*last.values()] == [expected_greedy(PREFIX, 6, eos=None)] * 3
    computed = sum(new for step in engine.runner.steps for new, *_ in step.values())
    assert computed == 18 + 2 * 2 + 3 * 5


def test_an_evicted_block_loses_its_snapshot() -> None:
    engine = stateful_engine(num_blocks=6)
    answer(engine, PREFIX)
    # takes all blocks, one of them with other tokens than before
    answer(engine, [9, *PREFIX[1:]])
    assert answer(engine, PREFIX).num_cached_tokens == 0
    assert answer(engine, PREFIX).num_cached_tokens == 16


@pytest.mark.parametrize("seed", range(12))
def test_random_histories(seed: int) -> None:
    """Prompts that begin alike, few rows, blocks and snapshots, preemption, n > 1 and resets."""
    draw = random.Random(seed)
    num_snapshots, num_blocks = draw.choice([1, 3, 8]), draw.choice([14, 20, 64])
    engine = stateful_engine(
        num_snapshots,
        num_blocks=num_blocks,
        max_model_len=48,
        max_num_seqs=draw.choice([1, 3, 4]),
        max_num_batched_tokens=draw.choice([4, 9, 40]),
        target_gap_s=draw.choice([0.0, 1e-9]),
    )
    wanted: dict[str, list[int]] = {}
    found: dict[tuple[str, int], list[int]] = {}
    for number in range(40):
        kept = draw.randrange(1, 19)
        tail = [draw.randrange(2, 5) for _ in range(draw.randrange(12))]
        prompt = PREFIX[:kept] + tail
        name, length = str(number), draw.randrange(1, 12)
        params = SamplingParams(
            temperature=0,
            max_tokens=length,
            ignore_eos=True,
            n=draw.choice([1, 1, 2]) if engine.runner.input_batch.max_num_seqs > 1 else 1,
            skip_reading_prefix_cache=draw.random() < 0.1,
        )
        wanted[name] = expected_greedy(prompt, length, eos=None)
        engine.add_request(name, prompt, params)
        for _ in range(draw.randrange(6)):
            for output in engine.step():
                found[output.request_id, output.index] = output.token_ids
        if draw.random() < 0.03:
            engine.block_manager.reset_prefix_cache()
    for name, outputs in run_all(engine).items():
        found |= {(name, output.index): output.token_ids for output in outputs}
    assert {name for name, _ in found} == set(wanted)
    for (name, _), tokens in found.items():
        assert tokens == wanted[name]
    if num_blocks == 64 and num_snapshots == 8:
        assert engine.stats().prefix_cache_hits > 0


def test_a_snapshot_moves_to_the_block_that_is_found() -> None:
    """Two requests compute the same block, and the one that is found had no snapshot."""
    copies: list[tuple[int, int]] = []
    manager = BlockManager(6, 2)
    manager.snapshots = Snapshots([7], lambda *places: copies.append(places), 2)
    keys = BlockKeys([1, 2, 3, 4, 5], 2, None)
    for name in ("first", "second"):
        manager.allocate(name, 5)
        if name == "second":
            manager.snapshots.take(manager.blocks_of(name), 1, 4, 5)
        manager.cache_full_blocks(name, keys, 4)
    assert manager.find_cached_blocks(keys, 5) == [0, 1]
    manager.free("second")
    reservation = manager.reserve("third", keys, 5, [0, 1], 0, reads_host=False)
    assert reservation is not None and reservation.num_cached == 2
    manager.admit("third", 2)
    assert not copies
    manager.snapshots.enqueue()
    assert copies == [(1, 7), (7, 2)]
