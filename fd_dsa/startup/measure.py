"""Measurement of steps before the first request, for the cost of drafts and of prompts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fd_dsa.capture_sizes import PROMPT_SIZES
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import Drafter, SpecDecoder
from fd_dsa.engine.step_times import StepTable
from fd_dsa.startup.trial_rows import clear_rows
from fd_dsa.startup.warm_up import run_trial

if TYPE_CHECKING:
    from fd_dsa.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

MAX_MEASURING_S = 3.0
"""Stop measuring larger batches after this time, because large models on a CPU are slow."""
# tokens in front of those that are measured
_CONTEXT = 128
STEPS_AHEAD = 16
"""Timed steps of each size if the next step is enqueued before the tokens of a step are known."""
# timed steps of each size if the host samples
_STEPS = 4
# tokens per measured step that a request may sample, so that it has enough steps
_TOKENS_A_STEP = 6
# rows from which on each further row of a CPU step takes as long as the one before
_MANY_ROWS = 16
# steps with prompts: seconds for all of them, decode rows, and runs of which the shortest counts
_MAX_TABLE_S, _DECODE_ROWS, _RUNS = 5.0, 16, 2


def measure_step_costs(
    make_engine: Callable[[SpecDecoder], LLMEngine], drafter: Drafter, num_drafts: int
) -> DraftCosts | None:
    """Measure decode steps of 1, 4, 16, ... rows, each with 0 to `num_drafts` drafts a row.

    Call it before the first request, because the measured requests overwrite the caches.

    Args:
        make_engine: makes an engine that only the measurement uses.
        drafter: makes the drafts, which need not be right.
        num_drafts: maximum number of drafts of a row.

    Returns:
        The table, or None if no such step fits into the caches.
    """
    spec_decoder = SpecDecoder(drafter, num_drafts)
    engine = make_engine(spec_decoder)
    info, max_rows = engine.runner.info, engine.runner.input_batch.max_num_seqs
    if info.sampling is None:
        max_rows = min(max_rows, _MANY_ROWS)
    seconds: dict[int, list[float]] = {}
    begin, num_rows = engine.clock(), 0
    while num_rows < max_rows and engine.clock() - begin < MAX_MEASURING_S:
        num_rows = min(4 * num_rows or 1, max_rows)
        times = []
        for count in range(num_drafts + 1):
            # with these costs `count` drafts are the best
            costs = {1: [1.0] * (count + 1) + [math.inf] * (num_drafts - count)}
            spec_decoder.costs = DraftCosts(costs)
            times.append(_step_seconds(engine, num_rows, num_rows * count))
        if math.inf in times:
            break
        seconds[num_rows] = times
    # warm-up steps do not count
    if info.counters is not None:
        info.counters.reset()
    return DraftCosts(seconds) if seconds else None


def _step_seconds(engine: LLMEngine, num_rows: int, num_drafts: int) -> float:
    """Return the time between two decode steps of a size, seconds.

    It is infinite if no step has the size. If steps are enqueued ahead, a short one follows a long
    one, so the median counts. Otherwise the minimum counts, because other work of the machine only
    adds time.

    Args:
        num_rows: rows of the step.
        num_drafts: drafts of the whole step.
    """
    limits, is_ahead = engine.limits, engine.runner.info.sampling is not None
    steps = STEPS_AHEAD if is_ahead else _STEPS
    room = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    # a row shares the blocks of the rows before it, which have computed these tokens
    context = [0] * max(min(_CONTEXT, room - 1 - _TOKENS_A_STEP * steps), 0)
    max_tokens = min(_TOKENS_A_STEP * steps, room - 1)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for row in range(num_rows):
        engine.add_request(str(row), [*context, row % limits.vocab_size], params)
    times, drafts = list[float](), engine.stats().num_draft_tokens
    while engine.has_unfinished_requests() and len(times) < steps:
        begin, before = engine.clock(), drafts
        outputs, end = engine.step(), engine.clock()
        drafts = engine.stats().num_draft_tokens
        # the first token of an output comes from a prefill step
        is_decode = len(outputs) == num_rows and all(one.num_tokens > 1 for one in outputs)
        if is_decode and drafts - before == num_drafts:
            times.append(end - begin)
    engine.abort_all()
    # drops the step in flight
    engine.step()
    if not times:
        return math.inf
    return float(np.median(times)) if is_ahead else min(times)


def measure_step_table(
    runner: ModelRunner,
    max_model_len: int,
    sizes: Sequence[int] = PROMPT_SIZES,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTable | None:
    """Measure steps of decode rows and a prompt, the largest first.

    Call it before the first request, because the steps overwrite the caches. Sizes that there is no
    time for get the time of the next larger size.

    Args:
        runner: runner whose steps are warm, and captured unless all steps are eager.
        max_model_len: maximum length of a row, tokens.
        sizes: numbers of tokens, ascending.
        clock: times the steps, seconds.

    Returns:
        The table, or None if no step can have both a decode row and a prompt of some tokens.
    """
    batch, index_topk, begin = runner.input_batch, runner.model.config.index_topk, clock()
    num_decode = min(_DECODE_ROWS, batch.max_num_seqs - 1)
    short = min(index_topk, max_model_len - 1)
    limit = min(batch.max_num_tokens, num_decode + short)
    sizes = [size for size in sizes if num_decode < size <= limit]
    if not num_decode or not sizes:
        return None
    longest = sizes[-1] - num_decode
    far = max_model_len - longest
    # context of the prompt, and of the decode rows, which make a step long
    kinds = [(0, short - 1), (min(index_topk, far), short), (far, short)]
    # all rows share the blocks that the first step writes, so that no row has arbitrary keys
    blocks = np.arange(batch.block_tables.shape[1]) % max(longest // batch.block_size, 1)
    for row in range(num_decode + 1):
        batch.set_blocks(row, blocks.tolist())
    # equal ids would select the same experts
    ids = np.random.default_rng(0).integers(runner.vocab_size, size=sizes[-1]).tolist()
    are_prompts = [False] * num_decode + [True]
    times: list[list[float]] = [[], [], []]
    for size in reversed(sizes):
        for (context, before), column in zip(kinds, times, strict=True):
            new = [1] * num_decode + [size - num_decode]
            cached = [before] * num_decode + [context]
            taken = column[-1:]
            for _ in range(_RUNS if not taken or clock() - begin < _MAX_TABLE_S else 0):
                batch.begin_step()
                batch.add_rows(range(num_decode + 1), new, ids[:size], cached, are_prompts)
                start = clock()
                run_trial(runner, size - 1)
                taken.append(clock() - start)
            # a smaller step takes no longer, so a longer time is noise
            column.append(min(taken))
    clear_rows(batch)
    # measured steps do not count
    runner.counters.reset()
    few, near, many = (column[::-1] for column in times)
    logger.info(
        "steps with prompts of %d to %d tokens take %.1f to %.1f ms, measured in %.1f s",
        *(sizes[0], sizes[-1], 1e3 * few[0], 1e3 * near[-1], clock() - begin),
    )
    return StepTable(sizes, index_topk, few, (kinds[1][0], near), (far, many))
