"""How long decode steps take by their tokens and drafts: what drafts cost."""

from __future__ import annotations

import logging
import time
import timeit
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from fd_dsa.engine.draft_state import DraftState
from fd_dsa.runner.counters import StepCounters
from fd_dsa.runner.input_batch import Draw

logger = logging.getLogger(__name__)
# tokens in front of those that are measured
_CONTEXT = 128
_REPEATS = 3
_NOTHING = np.empty(0, np.int64)
# seconds after which no larger step is measured: with a large model on a CPU they are long
_PATIENCE_S = 3.0
# rows from which on GEMMs of a CPU take as much longer as they have more
_MANY_ROWS = 8
# newest steps whose median says what the host needs, and the fewest
_RECENT, _ENOUGH = 9, 4
# steps without drafts after which what the host needs for drafts is learned again
_RETRY = 4096


class StepCosts:
    """Seconds of a decode step by its drafts and tokens, as measured when the engine started.

    Where steps are queued ahead the host works beside them, and the slower side counts. What it
    needs for steps with and without drafts is learned from those that run, by doublings of the
    rows.

    Args:
        seconds: of a step of some rows, if each has 0, 1 and so on drafts.
    """

    def __init__(self, seconds: Mapping[int, Sequence[float]]) -> None:
        self._rows = list(seconds)
        # a larger step that took less time shows what was noise
        least = np.array([*seconds.values()])[::-1, ::-1]
        least = np.minimum.accumulate(np.minimum.accumulate(least, 0), 1)
        self._seconds = least[::-1, ::-1]
        # by the doubling of the rows and whether there are drafts
        self._host: dict[tuple[int, bool], deque[float]] = {}
        self._num_plain = 0

    def of(self, num_rows: int, num_drafting: int) -> list[float]:
        """Time of a step of so many rows, of which some have 0, 1 and so on drafts each."""
        host = self._host_seconds(num_rows, False), self._host_seconds(num_rows, True)
        times = []
        for count, seconds in enumerate(self._seconds.T):
            # those that have as many tokens if all have drafts
            rows = (num_rows + count * num_drafting) / (1 + count)
            # past the last that were measured in proportion
            more = max(rows / self._rows[-1], 1.0)
            times.append(max(more * float(np.interp(rows, self._rows, seconds)), host[count > 0]))
        return times

    def observe(self, host_seconds: float, num_rows: int, has_drafts: bool) -> None:
        """Take in the time of a step, but for what the host waited where it had another to do."""
        size = _doubling(num_rows)
        self._host.setdefault((size, has_drafts), deque(maxlen=_RECENT)).append(host_seconds)
        self._num_plain += not has_drafts
        if not has_drafts and self._num_plain % _RETRY == 0:
            self._host.pop((size, True), None)

    def knows_plain(self, num_rows: int) -> bool:
        """Whether it is known what the host needs for steps without drafts."""
        return self._host_seconds(num_rows, False) > 0

    def _host_seconds(self, num_rows: int, has_drafts: bool) -> float:
        """Seconds of the host for a step; 0: not known."""
        recent = self._host.get((_doubling(num_rows), has_drafts), ())
        return median(recent) if len(recent) >= _ENOUGH else 0.0


def _doubling(num_rows: int) -> int:
    """Number of the rows' doubling: 17 to 32 are one, so that a full batch is not alone in its."""
    return (num_rows - 1).bit_length()


def measure_steps(runner: Any, most: int, *, is_layer: bool) -> StepCosts | None:
    """Costs of decode steps of 1, 4, 16 and so on rows with up to `most` drafts each.

    For the time before the first request: what the caches hold is overwritten.

    Args:
        runner: of the engine.
        most: drafts of a row.
        is_layer: as of Drafter.

    Returns:
        None where there is no room for such a step.
    """
    batch, on_device = runner.input_batch, runner.draws is not None
    # a row has four tokens at most
    context = min(_CONTEXT, batch.block_tables.shape[1] * batch.block_size - 4)
    rows, most_rows = range(batch.max_num_seqs), batch.max_num_tokens // (1 + most)
    most_rows = min(most_rows, len(rows))
    if context < 1 or most_rows < 1:
        return None
    for row in rows:
        # all have the same, which are written before they are read
        batch.set_blocks(row, range(-(-(context + 4) // batch.block_size)))
        if on_device:
            from fd_dsa.ops.sampling import SlotParameters

            runner.draws.set_slot(row, SlotParameters())
    for done in range(0, context, batch.max_num_tokens):
        batch.begin_step()
        batch.add_row(0, [0] * min(batch.max_num_tokens, context - done), done, is_prefill=True)
        runner.execute_model(_NOTHING)
        if is_layer:
            ids = batch.ids_remove_padding[: batch.num_tokens]
            if on_device:
                runner.draft(ids, *[_NOTHING] * 4)
            else:
                runner.predict_more(ids, _NOTHING)
    seconds: dict[int, list[float]] = {}
    begin, num_rows, pays = time.perf_counter(), 0, True
    while num_rows < most_rows and pays and time.perf_counter() - begin < _PATIENCE_S:
        num_rows = min(4 * num_rows or 1, most_rows)
        steps = [partial(_run, runner, num_rows, n, context, is_layer) for n in range(most + 1)]
        runs = [[timeit.timeit(step, number=1) for step in steps] for _ in range(_REPEATS)]
        seconds[num_rows] = [min(times) for times in zip(*runs, strict=True)]
        if not on_device and num_rows >= _MANY_ROWS:
            pays = DraftState(most).length(seconds[num_rows]) > 0
    batch.begin_step()
    for row in rows:
        batch.clear_row(row)
    # these were no steps of requests
    runner.counters = StepCounters()
    logger.info(
        "decode steps without drafts: %s",
        ", ".join(f"{count} rows in {1e3 * times[0]:.1f} ms" for count, times in seconds.items()),
    )
    return StepCosts(seconds)


def _run(runner: Any, num_rows: int, count: int, context: int, is_layer: bool) -> None:
    """Run a decode step whose rows have drafts, and what makes as many drafts after it."""

    def add_rows(length: int) -> None:
        runner.input_batch.begin_step()
        for row in range(num_rows):
            runner.input_batch.add_row(row, [0] * length, context, is_prefill=False)

    tokens, drafts = np.arange(num_rows * (1 + count)), count if is_layer else 0
    add_rows(1 + count)
    if runner.draws is None:
        runner.execute_model(tokens)
        last = tokens[count :: 1 + count]
        for depth in range(drafts):
            if depth:
                add_rows(1)
                tokens = last = tokens[:num_rows]
                runner.continue_with(last)
            runner.predict_more(np.zeros_like(tokens), last)
        return
    slots = np.repeat(np.arange(num_rows), 1 + count).tolist()
    firsts = tokens[:: 1 + count].tolist()
    draw = Draw(slots, [0] * len(slots), firsts, [count] * num_rows, drafts=drafts > 0)
    runner.queue_model(tokens, draw)
    taken = runner.draw()
    if drafts > 1:
        runner.draft_more(num_rows, drafts)
    if drafts:
        # the wait for the tokens is then for them too
        runner.draws.read_drafts()
    taken()
