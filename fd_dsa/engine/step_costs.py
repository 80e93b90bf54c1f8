"""How long decode steps take by their rows and drafts: what drafts cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fd_dsa.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fd_dsa.engine.engine import LLMEngine
    from fd_dsa.engine.speculation import Speculator

# tokens in front of those that are measured
_CONTEXT = 128
# steps of as many rows and drafts that are timed one by one, and that are queued ahead
_STEPS, _STEPS_AHEAD = 4, 16
# tokens of a request in which there are so many, if few drafts stand
_TOKENS_A_STEP = 6
MAX_MEASURING_S = 3.0
"""Stop measuring larger batches after this time, because large models on a CPU are slow."""
# rows from which on each more takes as long, on a CPU
_MANY_ROWS = 16
# more rows than any step has
_FAR = 1 << 20


class StepCosts:
    """Seconds of a decode step by its rows and drafts.

    Args:
        seconds: of a step of some rows, if each has 0, 1 and so on drafts.
    """

    def __init__(self, seconds: Mapping[int, Sequence[float]]) -> None:
        # a larger step that took less time shows what was noise
        least = np.array([*seconds.values()])[::-1, ::-1]
        least = np.minimum.accumulate(np.minimum.accumulate(least, 0), 1)[::-1, ::-1]
        # each row past the last that were measured takes as long as each of those before
        rows, least = np.array([0, *seconds]), np.vstack([np.zeros_like(least[:1]), least])
        a_row = (least[-1] - least[-2]) / (rows[-1] - rows[-2])
        self._rows = [*seconds, _FAR]
        self._seconds = np.vstack([least[1:], least[-1] + (_FAR - rows[-1]) * a_row])

    def of(self, num_rows: int, num_drafting: int) -> list[float]:
        """Time of a step of so many rows, of which some have 0, 1 and so on drafts each."""
        # those that have as many tokens if all have drafts
        rows = [(num_rows + n * num_drafting) / (1 + n) for n in range(self._seconds.shape[1])]
        columns = zip(rows, self._seconds.T, strict=True)
        return [float(np.interp(count, self._rows, seconds)) for count, seconds in columns]


def measure_steps(engine: LLMEngine, speculator: Speculator) -> StepCosts | None:
    """Costs of decode steps of 1, 4, 16 and so on rows, from requests that are run.

    For the time before the first request: what the caches hold is overwritten.

    Args:
        engine: that serves nobody else.
        speculator: of the engine.

    Returns:
        None where there is no room for such a step.
    """
    runner, most = engine.runner, speculator.most
    most_rows = runner.input_batch.max_num_seqs
    if runner.info.sampling is None:
        most_rows = min(most_rows, _MANY_ROWS)
    seconds: dict[int, list[float]] = {}
    begin, num_rows = engine.clock(), 0
    while num_rows < most_rows and engine.clock() - begin < MAX_MEASURING_S:
        num_rows = min(4 * num_rows or 1, most_rows)
        times = []
        for count in range(most + 1):
            # that many are the best
            speculator.costs = StepCosts({1: [1.0] * (count + 1) + [math.inf] * (most - count)})
            times.append(_step_seconds(engine, num_rows, num_rows * count))
        if math.inf in times:
            break
        seconds[num_rows] = times
    # warm-up steps do not count
    if (counters := runner.info.counters) is not None:
        counters.reset()
    return StepCosts(seconds) if seconds else None


def _step_seconds(engine: LLMEngine, num_rows: int, num_drafts: int) -> float:
    """Seconds from one decode step of so many rows and drafts to the next; infinite without any.

    Steps that are queued ahead have a short one after a long one, so their median counts. Of others
    the fastest does, since what else runs only adds.
    """
    limits, is_ahead = engine.limits, engine.runner.info.sampling is not None
    steps = _STEPS_AHEAD if is_ahead else _STEPS
    room = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    # a row takes over the blocks of those measured before, which computed these tokens
    context = [0] * max(min(_CONTEXT, room - 1 - _TOKENS_A_STEP * steps), 0)
    most = min(_TOKENS_A_STEP * steps, room - 1)
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    for row in range(num_rows):
        engine.add_request(str(row), [*context, row % limits.vocab_size], params)
    times, drafts = list[float](), engine.stats().num_draft_tokens
    while engine.has_unfinished_requests() and len(times) < steps:
        begin, before = engine.clock(), drafts
        outputs, end = engine.step(), engine.clock()
        drafts = engine.stats().num_draft_tokens
        # the first token is that of the prompt
        is_decode = len(outputs) == num_rows and all(one.num_tokens > 1 for one in outputs)
        if is_decode and drafts - before == num_drafts:
            times.append(end - begin)
    engine.abort_all()
    # drops what is in flight
    engine.step()
    if not times:
        return math.inf
    return float(np.median(times)) if is_ahead else min(times)
