"""Prefix caching of rows with a state in addition to blocks, over a runner that checks it."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fd_dsa.engine.block_keys import BlockKeys
from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.host_tier import HostTier
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.snapshots import Snapshots
from fd_dsa.runner.input_batch import NO_SLOT
from tests.engine.fakes import FakeRunner, expected_greedy, make_engine, run_all
from tests.engine.test_host_tier import HeldStore
from tests.soak.late_store import LateStore

# first places of snapshots
ON_DEVICE, IN_HOST = 100, 200
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PREFIX = [5, 9, 2, 31, 17, 8, 8, 20, 3, 12, 30, 6, 7, 25, 11, 4, 19, 22]


class StatefulRunner(FakeRunner):
    """Keeps the tokens of each row beside the cache, and refuses to go on after other ones.

    Attributes:
        counts: copies of states by the kinds of their places.
    """

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.states: dict[int, list[int]] = {}
        # steps before one that fails after its first layers
        self.failing = -1
        self.error: Exception = MemoryError("no memory")

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Check the state of each row against its blocks, and add the tokens of the step."""
        self.failing -= 1
        if self.failing == -1:
            rows = np.flatnonzero(self.input_batch.num_chunk_tokens).tolist()
            slots = self.input_batch.snapshot_slots
            self.states |= {place: [-1] for place in (*rows, *slots[slots != NO_SLOT].tolist())}
            raise self.error
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
        self.counts[kind_of(source), kind_of(target)] += 1


def kind_of(place: int) -> str:
    """Name the kind of a place: a row, or where it has a snapshot."""
    return "row" if place < ON_DEVICE else "device" if place < IN_HOST else "host"


def stateful_engine(
    num_snapshots: int = 8,
    host: tuple[int, int] = (0, 0),
    overlaps: bool = False,
    seed: int = 0,
    store: Any = None,
    **sizes: Any,
) -> Any:
    """An engine whose rows have states, without snapshots if requests share no prefixes.

    Args:
        host: numbers of blocks and of snapshots in host memory.
        overlaps, seed: as for LateStore.
        store: class of the memory of blocks; None = LateStore.
    """
    engine = make_engine(**sizes, enable_prefix_caching=num_snapshots > 0)
    manager = engine.block_manager
    engine.runner = runner = StatefulRunner(engine.runner.input_batch, manager.num_blocks)
    manager.shares_blocks = manager.repeats_chunks = False
    num_host_blocks, num_host_snapshots = host
    if num_snapshots:
        slots = range(ON_DEVICE, ON_DEVICE + num_snapshots)
        in_host = range(IN_HOST, IN_HOST + num_host_snapshots)
        manager.use_snapshots(Snapshots(slots, runner.copy, manager.block_size, in_host))
    if num_host_blocks:
        if store is not None:
            made = store([runner.cache], num_host_blocks)
        else:
            made = LateStore(runner.cache[None], num_host_blocks, overlaps, seed)
        manager.use_host_tier(HostTier(made), num_ahead=seed % 3)
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


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError("no answer")])
@pytest.mark.parametrize("num_snapshots", [0, 1, 8])
@pytest.mark.parametrize("failing", [0, 1, 2, 3, 4])
def test_a_step_that_fails_changes_no_token(
    failing: int, num_snapshots: int, error: Exception
) -> None:
    """Its rows have keys of tokens that the next step computes again, or leaves for later."""
    engine = stateful_engine(num_snapshots, max_num_batched_tokens=10)
    engine.runner.failing, engine.runner.error = failing, error
    prompts = [PREFIX, [3, *PREFIX], [*PREFIX[:9], 2]]
    for _ in range(2):
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, GREEDY)
        last = {}
        while engine.has_unfinished_requests():
            # the caller of a step gets any other error than that of memory
            with contextlib.suppress(OSError):
                last |= {output.request_id: output.token_ids for output in engine.step()}
        for number, prompt in enumerate(prompts):
            assert last[str(number)] == expected_greedy(prompt, 6, eos=None)
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


def run_history(seed: int, has_host: bool) -> Any:
    """The engine after a random history, whose tokens were those of requests alone.

    Prompts begin alike. There are few rows, blocks and snapshots, preemption, n > 1, aborts, steps
    without memory, and resets.
    """
    draw = random.Random(seed)
    num_blocks = draw.choice([14, 20, 12 if has_host else 64])
    engine = stateful_engine(
        draw.choice([1, 3, 8]),
        (draw.choice([3, 12, 80]), draw.choice([1, 3, 30])) if has_host else (0, 0),
        draw.random() < 0.7,
        seed,
        num_blocks=num_blocks,
        max_model_len=48,
        max_num_seqs=draw.choice([1, 3, 4]),
        max_num_batched_tokens=draw.choice([4, 9, 40]),
        target_gap_s=draw.choice([0.0, 1e-9]),
    )
    runner, wanted = engine.runner, dict[str, list[int]]()
    found: dict[tuple[str, int], Any] = {}
    for number in range(40):
        begin = PREFIX if draw.random() < 0.7 else PREFIX[::-1]
        prompt = begin[: draw.randrange(1, 19)]
        prompt = prompt + [draw.randrange(2, 5) for _ in range(draw.randrange(12))]
        name, length = str(number), draw.randrange(1, 12)
        params = SamplingParams(
            temperature=0,
            max_tokens=length,
            ignore_eos=True,
            n=draw.choice([1, 1, 2]) if runner.input_batch.max_num_seqs > 1 else 1,
            skip_reading_prefix_cache=draw.random() < 0.1,
        )
        wanted[name] = expected_greedy(prompt, length, eos=None)
        engine.add_request(name, prompt, params)
        if draw.random() < 0.1:
            runner.failing = draw.randrange(4)
        outputs = [output for _ in range(draw.randrange(6)) for output in engine.step()]
        if draw.random() < 0.1:
            outputs += engine.abort_request(str(draw.randrange(number + 1)))
        found |= {(output.request_id, output.index): output for output in outputs}
        if draw.random() < 0.03:
            engine.block_manager.reset_prefix_cache()
    for outputs in run_all(engine).values():
        found |= {(output.request_id, output.index): output for output in outputs}
    assert {name for name, _ in found} == set(wanted)
    for (name, _), output in found.items():
        tokens = wanted[name]
        assert output.finished and output.token_ids == tokens[: len(output.token_ids)]
        # a request alone without memory ends in an error
        assert output.finish_reason in ("abort", "error") or output.num_tokens == len(tokens)
    assert engine.stats().num_used_blocks == 0 and not engine.block_manager.reservations
    return engine


@pytest.mark.parametrize("seed", range(12))
def test_random_histories(seed: int) -> None:
    run_history(seed, has_host=False)


def test_random_histories_with_host_memory() -> None:
    """Rows go on after snapshots and blocks from host memory, some of which are late or lost."""
    copies, stats = Counter[tuple[str, str]](), Counter[str]()
    for seed in range(40):
        engine = run_history(seed, has_host=True)
        copies += engine.runner.counts
        of_engine = engine.stats()
        for name in ("num_preemptions", "prefix_cache_hits", "prefix_cache_host_hits"):
            stats[name] += getattr(of_engine, name)
    assert copies["device", "host"] > 100 and copies["host", "row"] > 100
    assert copies["device", "row"] > 100 and min(stats.values()) > 50


def test_a_snapshot_moves_to_the_block_that_is_found() -> None:
    """Two requests compute the same block, and the one that is found had no snapshot."""
    copies: list[tuple[int, int]] = []
    manager = BlockManager(6, 2)
    manager.use_snapshots(Snapshots([7], lambda *places: copies.append(places), 2))
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
    manager.admit("third", keys, 2)
    assert not copies
    manager.snapshots.enqueue()
    assert copies == [(1, 7), (7, 2)]


def test_a_second_turn_goes_on_after_host_memory() -> None:
    engine = stateful_engine(host=(20, 4), num_blocks=7)
    answer(engine, PREFIX)
    turn = PREFIX + expected_greedy(PREFIX, 6, eos=None)
    # takes all blocks
    answer(engine, [9, *PREFIX, 1, 2, 3, 4])
    output = answer(engine, [*turn, 3], SamplingParams(temperature=0, max_tokens=1))
    assert (output.num_cached_tokens, output.num_host_cached_tokens) == (20, 20)
    assert engine.runner.counts["host", "row"] == 1


def test_a_block_of_the_caches_has_its_snapshot_in_host_memory() -> None:
    engine = stateful_engine(num_snapshots=1, host=(20, 4))
    for prompt in (PREFIX, [9, *PREFIX]):
        answer(engine, prompt)
    output = answer(engine, PREFIX)
    assert (output.num_cached_tokens, output.num_host_cached_tokens) == (16, 0)
    assert engine.runner.counts["host", "row"] == 1


def test_a_request_that_waits_for_blocks_loses_its_snapshot() -> None:
    sizes = {"num_blocks": 14, "max_model_len": 56, "max_num_batched_tokens": 56}
    engine = stateful_engine(1, (30, 4), store=HeldStore, **sizes)
    turn = PREFIX + answer(engine, PREFIX).token_ids
    # takes all blocks
    answer(engine, [9] * 55, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    engine.add_request("runs", [7] * 3, params)
    engine.step()
    engine.add_request("waits", turn, GREEDY)
    engine.step()
    [reservation] = engine.block_manager.reservations.values()
    assert (reservation.num_cached, reservation.num_loaded) == (5, 5)
    engine.block_manager.reset_prefix_cache()
    outputs = run_all(engine)
    assert outputs["runs"][-1].token_ids == expected_greedy([7] * 3, 30, eos=None)
    assert outputs["waits"][-1].token_ids == expected_greedy(turn, 6, eos=None)
    assert outputs["waits"][-1].num_cached_tokens == 0


def test_copies_go_on_with_the_one_that_failed() -> None:
    copies: list[tuple[int, int]] = []
    failing = [False, True, False, False, False]

    def copy(*places: int) -> None:
        if failing.pop(0):
            raise MemoryError("no memory")
        copies.append((places[0], places[1]))

    snapshots = Snapshots([7], copy, 2, [9])
    for row, block in enumerate((3, 4)):
        snapshots.key_of = {block - 1: b"key"}
        snapshots.take([block], row, 2, 2)
    snapshots.restore(3, b"key", 5)
    with pytest.raises(MemoryError):
        snapshots.enqueue()
    snapshots.enqueue()
    assert copies == [(0, 7), (7, 9), (1, 7), (9, 5)]
