"""Measurement of the cost table of drafts, on the steps of a real engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import Drafter, SpecDecoder

MAX_MEASURING_S = 3.0
"""Stop measuring larger batches after this time, because large models on a CPU are slow."""
# tokens in front of those that are measured
_CONTEXT = 128
# timed steps of each size if the host samples, and if the next step is enqueued before
_STEPS, _STEPS_AHEAD = 4, 16
# tokens per measured step that a request may sample, so that it has enough steps
_TOKENS_A_STEP = 6
# rows from which on each further row of a CPU step takes as long as the one before
_MANY_ROWS = 16


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
    steps = _STEPS_AHEAD if is_ahead else _STEPS
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
