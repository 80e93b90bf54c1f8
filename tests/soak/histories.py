"""Random request histories against the engine's scheduler and block manager, without a model.

    python -m tests.soak.histories --histories 10000
    python -m tests.soak.histories --first 4711 --histories 1

A history is a function of its number, so a failure is repeated by the second form.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.host_tier import HostTier
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.prompt_lookup import PromptLookup
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import Drafter, SpecDecoder
from fd_dsa.runner.input_batch import InputBatch
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import byte_tokenizer, random_clock
from tests.soak import report
from tests.soak.audit import audit, evictable_keys, running_requests, waiting_requests
from tests.soak.checking_runner import (
    EOS,
    VOCAB_SIZE,
    AheadDrafter,
    CheckingRunner,
    DeviceGone,
    DrawingRunner,
)
from tests.soak.late_store import NUM_CACHES, LateRanks, LateStore

MAX_MODEL_LEN = 48
MAX_STEPS = 20_000
TOKENIZER = byte_tokenizer()


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and the one before which it is given up."""

    prompt: tuple[int, ...]
    params: SamplingParams
    at_step: int
    abort_at: int | None


@dataclass(frozen=True)
class History:
    """One engine and what is asked of it."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    nan_share: int
    fail_share: float
    target_gap_s: float
    clock_seed: int
    arrivals: tuple[Arrival, ...]
    draws_on_device: bool
    async_scheduling: bool
    max_drafts: int
    right_share: float | None
    drafts_on_device: bool
    num_host_blocks: int = 0
    copies_overlap: bool = False
    num_ahead: int = 0
    num_ranks: int = 1


@dataclass
class Run:
    """A history on its way.

    Attributes:
        counts: what has happened, for the report.
        last: newest state of each output, by request and index.
    """

    engine: LLMEngine
    counts: Counter[str] = field(default_factory=Counter)
    last: dict[tuple[int, int], RequestOutput] = field(default_factory=dict)


def draw_history(number: int) -> History:
    """The history of that number."""
    draw = random.Random(number)
    block_size = draw.choice([1, 2, 4, 8])
    stem = [draw.randrange(2, VOCAB_SIZE) for _ in range(40)]
    arrivals = tuple(_draw_arrival(draw, stem) for _ in range(draw.randint(1, 14)))
    longest = max(len(one.prompt) + (one.params.max_tokens or 0) - 1 for one in arrivals)
    draws_on_device = draw.random() < 0.6
    if draws_on_device and draw.random() < 0.7:
        # nothing that the host must do to logits
        plain = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "logit_bias": None}
        plain |= {"bad_words": None, "min_tokens": 0, "prompt_logprobs": None}
        arrivals = tuple(replace(a, params=replace(a.params, **plain)) for a in arrivals)
    return History(
        num_blocks=-(-longest // block_size) + draw.choice([0, 1, 3, 10, 40]),
        block_size=block_size,
        max_num_seqs=draw.randint(1, 6),
        max_num_batched_tokens=draw.choice([1, 2, 3, 5, 8, 13, 24, 40]),
        enable_prefix_caching=draw.random() < 0.9,
        nan_share=draw.choice([0, 0, 0, 300]),
        fail_share=draw.choice([0, 0, 0, 0.1]),
        target_gap_s=draw.choice([0, 0, 1e-3, 0.1, 10]),
        clock_seed=draw.randrange(1 << 30),
        arrivals=arrivals,
        draws_on_device=draws_on_device,
        async_scheduling=draw.random() < 0.8,
        max_drafts=draw.choice([0, 0, 1, 2, 3]),
        # None: prompt lookup
        right_share=draw.choice([None, 0.0, 0.7, 1.0]),
        drafts_on_device=draws_on_device and draw.random() < 0.7,
    )


def with_host_tier(history: History) -> History:
    """The same history with host memory for evicted blocks, and more reason to evict some."""
    draw = random.Random(history.clock_seed)
    return replace(
        history,
        num_blocks=min(history.num_blocks, -(-MAX_MODEL_LEN // history.block_size) + 2),
        enable_prefix_caching=True,
        num_host_blocks=draw.choice([1, 3, 10, 60, 60]),
        copies_overlap=draw.random() < 0.7,
        num_ahead=draw.choice([0, 2, 8]),
        num_ranks=draw.choice([1, 1, 1, 2, 3, 4]),
    )


def _draw_arrival(draw: random.Random, stem: list[int]) -> Arrival:
    """A request whose prompt mostly begins as others do."""
    begin = stem[: draw.randint(0, 30)]
    prompt = begin + [draw.randrange(2, VOCAB_SIZE) for _ in range(draw.randint(1, 5))]
    at_step, max_tokens = draw.randint(0, 30), draw.randint(1, MAX_MODEL_LEN - len(prompt))
    params = SamplingParams(
        n=draw.choice([1, 1, 1, 2, 3]),
        temperature=draw.choice([0.0, 1.0]),
        top_k=draw.choice([0, 0, 2]),
        top_p=draw.choice([1.0, 1.0, 0.7]),
        min_p=draw.choice([0.0, 0.0, 0.1]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.5]),
        frequency_penalty=draw.choice([0.0, 0.0, 1.0]),
        logit_bias=draw.choice([None, None, {draw.randrange(VOCAB_SIZE): 3.0}]),
        bad_words=draw.choice([None, None, ["ab", "c"]]),
        stop_token_ids=draw.choice([None, None, [draw.randrange(2, VOCAB_SIZE)]]),
        min_tokens=draw.choice([0, 0, draw.randint(0, max_tokens)]),
        seed=draw.randint(0, 3),
        max_tokens=max_tokens,
        ignore_eos=draw.random() < 0.7,
        cache_salt=draw.choice([None, None, None, "a", "b"]),
        skip_reading_prefix_cache=draw.random() < 0.1,
        prompt_logprobs=0 if draw.random() < 0.1 else None,
        speculative=draw.random() < 0.9,
    )
    abort_at = at_step + draw.randint(0, 25) if draw.random() < 0.25 else None
    return Arrival(tuple(prompt), params, at_step, abort_at)


def make_drafter(history: History) -> Drafter:
    """Make the drafter of a history."""
    if history.right_share is None:
        return PromptLookup(3, 1)
    answers = {
        (str(index), choice): tokens
        for index, one in enumerate(history.arrivals)
        for choice, (tokens, _) in enumerate(run_alone(one, history))
    }
    kind = AheadDrafter if history.drafts_on_device else KnowingDrafter
    # one that reads tokens must say so where they come late
    is_layer = history.drafts_on_device or not history.draws_on_device
    return kind(answers, history.right_share, VOCAB_SIZE, history.clock_seed, is_layer)


def make_store(history: History, caches: np.ndarray) -> LateStore | LateRanks:
    """Host memory of a history. A copy that fails on one of several ranks ends them all."""
    sizes = history.num_host_blocks, history.copies_overlap, history.clock_seed
    if history.num_ranks > 1:
        return LateRanks(caches, history.num_ranks, *sizes)
    return LateStore(caches, *sizes, history.fail_share)


def make_engine(history: History) -> LLMEngine:
    """The engine of a history over a checking runner."""
    spec_decoder = None
    if history.max_drafts:
        drafter = make_drafter(history)
        spec_decoder = SpecDecoder(drafter, history.max_drafts)
    batch = InputBatch(
        history.max_num_seqs,
        history.max_num_batched_tokens,
        -(-MAX_MODEL_LEN // history.block_size),
        history.block_size,
    )
    kind = DrawingRunner if history.draws_on_device else CheckingRunner
    runner = kind(
        batch,
        history.num_blocks,
        lambda: running_requests(engine),
        history.nan_share,
        num_copies=1 if history.num_ranks == 1 else history.num_ranks * NUM_CACHES,
    )
    if history.max_drafts and isinstance(drafter, AheadDrafter):
        drafter.runner = runner
    engine = LLMEngine(
        runner,
        TOKENIZER,
        num_blocks=history.num_blocks,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[EOS],
        target_gap_s=history.target_gap_s,
        enable_prefix_caching=history.enable_prefix_caching,
        async_scheduling=history.async_scheduling,
        spec_decoder=spec_decoder,
    )
    if history.num_host_blocks:
        store = make_store(history, runner.cache)
        engine.block_manager.use_host_tier(HostTier(store), history.num_ahead)
    # chunks follow measured times; no output may
    engine.clock = random_clock(history.clock_seed)
    return engine


def run_history(history: History, seed: int = 0) -> Counter[str]:
    """Run a history to its end.

    Args:
        history: what is asked.
        seed: of the steps that fail.

    Returns:
        How often what happened.

    Raises:
        AssertionError: an invariant does not hold.
    """
    run = Run(make_engine(history))
    draw = random.Random(seed)
    for step in range(MAX_STEPS):
        _arrive_and_abort(run, history, step)
        if run.engine.has_unfinished_requests():
            run.engine.runner.fails_late = draw.random() < history.fail_share
            _step(run, history, draw.random() < history.fail_share)
        elif step > max(one.at_step for one in history.arrivals):
            break
    else:
        raise AssertionError(f"not finished after {MAX_STEPS} steps")
    stats = run.engine.stats()
    assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert (run.engine.runner.input_batch.block_tables == -1).all()
    _check_outputs(run, history)
    run.counts["preemptions"] += stats.num_preemptions
    run.counts["prompt tokens from the prefix cache"] += stats.prefix_cache_hits
    run.counts["prompt tokens from host memory"] += stats.prefix_cache_host_hits
    if history.num_ranks > 1:
        run.counts["the same on several ranks"] += stats.prefix_cache_host_hits
    run.counts["tokens generated"] += stats.generated_tokens
    run.counts["drafts"] += stats.num_draft_tokens
    run.counts["accepted drafts"] += stats.num_accepted_tokens
    return run.counts


def _arrive_and_abort(run: Run, history: History, step: int) -> None:
    """Add and abort requests before this step."""
    for index, one in enumerate(history.arrivals):
        if one.at_step == step:
            run.counts["requests"] += 1
            run.counts["outputs"] += one.params.n
            run.engine.add_request(str(index), one.prompt, one.params)
        if one.abort_at == step:
            loading = run.engine.block_manager.reservations
            run.counts["aborted while blocks are copied"] += len(loading)
            aborted = run.engine.abort_request(str(index))
            run.counts["aborted while blocks are copied"] -= len(loading)
            run.counts["aborted outputs"] += len(aborted)
            _keep(run, aborted)
            audit(run.engine)


def _step(run: Run, history: History, fails: bool) -> None:
    """One step, and all that must hold after it."""
    engine = run.engine
    keys = evictable_keys(engine)
    everyone = [*running_requests(engine).values(), *waiting_requests(engine)]
    earliest = min(everyone, key=lambda request: request.seq_id)
    before = (
        earliest.num_computed_tokens - earliest.num_pending_drafts,
        len(earliest.token_ids),
    )
    engine.runner.fails = fails
    run.counts["steps"] += 1
    try:
        outputs = engine.step()
    except DeviceGone:
        run.counts["failed steps"] += 1
        audit(engine)
        return
    assert 0 < engine.runner.num_tokens <= history.max_num_batched_tokens
    after = (
        earliest.num_computed_tokens - earliest.num_pending_drafts,
        len(earliest.token_ids),
    )
    # so nobody waits for more steps than those in front of it have tokens
    assert earliest.finish_reason or before < after, f"request {earliest.seq_id} was left out"
    if all(output.finish_reason != "error" for output in outputs):
        run.counts["evicted blocks"] += len(keys - evictable_keys(engine))
    run.counts["steps while a request waits for copies"] += len(engine.block_manager.reservations)
    ahead = engine.in_flight
    run.counts["steps queued ahead"] += ahead is not None
    drafts = () if ahead is None else ahead.drafts.values()
    run.counts["drafts queued ahead"] += sum(map(len, drafts))
    _keep(run, outputs)
    audit(engine)


def _keep(run: Run, outputs: list[RequestOutput]) -> None:
    """Remember the newest state of every output; tokens only ever grow."""
    for output in outputs:
        name = int(output.request_id), output.index
        if name in run.last:
            assert not run.last[name].finished, f"output {name} goes on after its end"
        run.last[name] = output
        run.counts["outputs with an error"] += output.finish_reason == "error"


def _check_outputs(run: Run, history: History) -> None:
    """Every output is what the request gets alone, or the beginning of it."""
    assert sum(one.params.n for one in history.arrivals) == len(run.last)
    for index, one in enumerate(history.arrivals):
        alone = run_alone(one, history)
        for choice in range(one.params.n):
            output = run.last[index, choice]
            tokens, reason = alone[choice]
            assert output.finished, f"request {index} has no end"
            if output.finish_reason == "abort":
                assert tokens[: len(output.token_ids)] == output.token_ids, f"request {index}"
            else:
                assert (output.token_ids, output.finish_reason) == (tokens, reason), (
                    f"request {index}, choice {choice}: {output.token_ids}, alone {tokens}"
                )


def run_alone(one: Arrival, history: History) -> list[tuple[list[int], str | None]]:
    """Tokens and finish reason of each output of a request with an ample engine for itself."""
    ample = replace(
        history,
        num_blocks=64 * one.params.n,
        block_size=8,
        max_num_seqs=MAX_MODEL_LEN,
        max_num_batched_tokens=2 * MAX_MODEL_LEN,
        draws_on_device=False,
        drafts_on_device=False,
        max_drafts=0,
        num_host_blocks=0,
        num_ranks=1,
    )
    engine = make_engine(ample)
    engine.add_request("alone", one.prompt, one.params)
    ends: dict[int, RequestOutput] = {}
    while engine.has_unfinished_requests():
        ends.update({output.index: output for output in engine.step()})
    return [(list(ends[i].token_ids), ends[i].finish_reason) for i in range(one.params.n)]


def run_histories(first: int, count: int) -> Counter[str]:
    """Run the histories `first` .. `first + count - 1`; what happened in all of them."""
    numbers = range(first, first + count)
    return report.run_numbers(
        "tests.soak.histories", numbers, lambda number: run_history(draw_history(number), number)
    )


if __name__ == "__main__":
    report.main(__doc__, "histories", 10_000, run_histories)
