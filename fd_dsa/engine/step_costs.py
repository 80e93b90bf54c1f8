"""How long decode steps take by their tokens, and the host for them: what drafts cost."""

from __future__ import annotations

import logging
import time
import timeit
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from fd_dsa.runner.counters import StepCounters
from fd_dsa.runner.input_batch import Draw, InputBatch

logger = logging.getLogger(__name__)
# what a draft adds to a step where no times were measured, as a share of the step
_USUAL_COST = 0.1
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
    """How long a decode step takes by its tokens, measured when the engine starts.

    Where steps are queued ahead the host works beside them, and the slower side counts. What it
    needs for a step and for a draft is learned from those that run, by doublings of the rows.

    Args:
        seconds: of steps by their number of tokens; empty: a draft costs a tenth of a step.
        draft_seconds: of what a drafter does for each draft after the first, by rows.
        layer_seconds: of a layer that is left out of steps without drafts, by tokens.
    """

    def __init__(
        self,
        seconds: Mapping[int, float] | None = None,
        draft_seconds: Mapping[int, float] | None = None,
        layer_seconds: Mapping[int, float] | None = None,
    ) -> None:
        self._seconds = sorted((seconds or {}).items())
        self._draft_seconds = sorted((draft_seconds or {}).items())
        self._layer_seconds = sorted((layer_seconds or {}).items())
        # by the doubling of the rows and whether there are drafts: seconds and drafts of a step
        self._host: dict[tuple[int, bool], deque[tuple[float, int]]] = {}
        self._num_plain = 0

    @property
    def has_layer(self) -> bool:
        """Whether a layer is left out of steps without drafts."""
        return bool(self._layer_seconds)

    def of(self, num_rows: int, num_drafting: int, most: int) -> list[float]:
        """Time of a step of so many rows, of which some have drafts, 0 to `most` each."""
        if not self._seconds:
            share = num_drafting / num_rows
            return [1 + _USUAL_COST * share * count for count in range(most + 1)]
        costs = [_between(self._seconds, num_rows)]
        for count in range(1, most + 1):
            tokens = num_rows + count * num_drafting
            drafting = (count - 1) * _between(self._draft_seconds, num_drafting)
            layer = _between(self._layer_seconds, tokens)
            costs.append(_between(self._seconds, tokens) + drafting + layer)
        plain, each = self._host_step(num_rows, False), self._host_step(num_rows, True)
        if plain is None:
            return costs
        more = max(each[0] - plain[0], 0.0) / each[1] if each else 0.0
        host = [plain[0] + count * num_drafting * more for count in range(most + 1)]
        return [max(pair) for pair in zip(costs, host, strict=True)]

    def observe(self, host_seconds: float, num_rows: int, num_drafts: int) -> None:
        """Take in from one step to the next, but for what it waited where they are in flight."""
        size = doubling(num_rows)
        recent = self._host.setdefault((size, num_drafts > 0), deque(maxlen=_RECENT))
        recent.append((host_seconds, num_drafts))
        self._num_plain += num_drafts == 0
        if num_drafts == 0 and self._num_plain % _RETRY == 0:
            self._host.pop((size, True), None)

    def lacks_plain(self, num_rows: int) -> bool:
        """Whether the host is the slower side of steps with drafts, and not known of others."""
        step = self._host_step(num_rows, True)
        if not self._seconds or step is None or self._host_step(num_rows, False):
            return False
        return step[0] > _between(self._seconds, num_rows + step[1])

    def _host_step(self, num_rows: int, drafts: bool) -> tuple[float, int] | None:
        """Seconds of the host and drafts of a step with or without them; None: not known."""
        recent = sorted(self._host.get((doubling(num_rows), drafts), ()))
        return recent[len(recent) // 2] if len(recent) >= _ENOUGH else None


def doubling(num_rows: int) -> int:
    """Number of the rows' doubling: 17 to 32 are one, so that a full batch is not alone in its."""
    return (num_rows - 1).bit_length()


def measure_steps(runner: Any, most_tokens: int, *, predicts_more: bool) -> StepCosts:
    """Costs of decode steps, by those of 1, 2, 4 and so on up to `most_tokens` tokens.

    For the time before the first request: what the caches hold is overwritten.

    Args:
        runner: of the engine.
        most_tokens: of a step that decodes.
        predicts_more: whether its layer for multi-token prediction runs in each step.
    """
    batch, on_device = runner.input_batch, runner.draws is not None
    # a row has four tokens at most
    context = min(_CONTEXT, batch.block_tables.shape[1] * batch.block_size - 4)
    if context < 1:
        return StepCosts()
    rows = range(batch.max_num_seqs)
    for row in rows:
        # all have the same, which are written before they are read
        batch.set_blocks(row, range(-(-(context + 4) // batch.block_size)))
        if on_device:
            from fd_dsa.ops.sampling import SlotParameters

            runner.draws.set_slot(row, SlotParameters())
    seconds, drafting, layer = dict[int, float](), dict[int, float](), dict[int, float]()
    begin, num_tokens = time.perf_counter(), 1
    for done in range(0, context, batch.max_num_tokens):
        batch.begin_step()
        batch.add_row(0, [0] * min(batch.max_num_tokens, context - done), done, is_prefill=True)
        runner.execute_model(_NOTHING)
        if predicts_more:
            ids = batch.ids_remove_padding[: batch.num_tokens]
            if on_device:
                runner.draft(ids, *[_NOTHING] * 4)
            else:
                runner.predict_more(ids, _NOTHING)
    while num_tokens <= most_tokens and time.perf_counter() - begin < _PATIENCE_S:
        tokens = np.arange(num_tokens)
        lengths = _add_rows(batch, context, num_tokens)
        run = (
            partial(_draw, runner, lengths) if on_device else partial(runner.execute_model, tokens)
        )
        seconds[num_tokens] = _fastest(run)
        if on_device and predicts_more:
            with_layer = _fastest(partial(run, 1))
            further = _fastest(partial(run, min(2, runner.most_drafts)))
            layer[num_tokens] = max(with_layer - seconds[num_tokens], 0.0)
            drafting[num_tokens] = max(further - with_layer, 0.0)
        elif predicts_more:
            ids = np.zeros(num_tokens, np.int64)
            # each run leaves the hidden states that the next one takes
            drafting[num_tokens] = _fastest(partial(runner.predict_more, ids, tokens))
            whole, before = seconds[num_tokens] + drafting[num_tokens], seconds.get(num_tokens // 2)
            if num_tokens > _MANY_ROWS and before and whole > 2 * before:
                # not even right drafts pay from here on
                break
        num_tokens *= 2
    batch.begin_step()
    for row in rows:
        batch.clear_row(row)
    # these were no steps of requests
    runner.counters = StepCounters()
    # a larger step that took less time shows what was noise
    counts = [*seconds][::-1]
    seconds = dict(zip(counts, accumulate((seconds[count] for count in counts), min), strict=True))
    logger.info(
        "tokens of a decode step: %s",
        ", ".join(f"{count} in {1e3 * seconds[count]:.1f} ms" for count in sorted(seconds)),
    )
    return StepCosts(seconds, drafting, layer if on_device else drafting)


def _add_rows(batch: InputBatch, context: int, num_tokens: int) -> list[int]:
    """Fill the batch with a decode step in as many rows as there are; the tokens of each."""
    num_rows = min(num_tokens, batch.max_num_seqs)
    lengths = [(num_tokens + row) // num_rows for row in range(num_rows)]
    batch.begin_step()
    for row, length in enumerate(lengths):
        batch.add_row(row, [0] * length, context, is_prefill=False)
    return lengths


def _draw(runner: Any, lengths: list[int], drafts: int = 0) -> None:
    """Run the step in the batch on a device, with the draws of its tokens, and so many drafts."""
    firsts = [*accumulate(lengths, initial=0)]
    slots = [row for row, length in enumerate(lengths) for _ in range(length)]
    counts, positions = [length - 1 for length in lengths], [0] * len(slots)
    draw = Draw(slots, positions, firsts[:-1], counts, drafts=drafts > 0)
    runner.queue_model(np.arange(firsts[-1]), draw)
    taken = runner.draw()
    if drafts > 1:
        runner.draft_more(len(lengths), drafts)
    if drafts:
        # the wait for the tokens is then for them too
        runner.draws.read_drafts()
    taken()


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    return min(timeit.repeat(work, number=1, repeat=_REPEATS))


def _between(points: Sequence[tuple[int, float]], place: int) -> float:
    """Value at a place by the line through its neighbours; 0 without points."""
    if not points:
        return 0.0
    (left, low), (right, high) = points[0], points[0]
    for right, high in points:
        if right >= place:
            break
        left, low = right, high
    if right <= left:
        # past the last point in proportion, before the first as there
        return high * max(place / right, 1)
    return low + (high - low) * (place - left) / (right - left)
