"""A step of the engine: what the runner is given, and what is kept until its tokens have come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.draft_state import NO_DRAFTS, Drafts
from fd_dsa.engine.output import TopkPositions
from fd_dsa.engine.request import Request
from fd_dsa.runner.input_batch import Draw, InputBatch
from fd_dsa.runner.protocol import Runner


@dataclass(slots=True)
class LaunchedStep:
    """A step that has been launched, and whose tokens have not been given to its requests.

    Attributes:
        ready: when it could be launched.
        sampling: requests that get a token.
        reading: requests whose prompt is scored, and of how many tokens.
        resumed: those of `sampling` that do so at the end of a prompt.
        num_decode_tokens, num_prefill_tokens: of the step.
        prefill_context: of the scheduler.
        scheduled: all requests of the step in the order of their rows.
        drafts: drafts of requests of `sampling`, which have one more row of logits for each.
        num_rejected: those of them that have proved wrong.
        known_drafts: as of `DeviceDraws.read_drafts`, where masks need the drafts of a device.
        places: what is drawn on a device; None: the host samples from `logits`.
        draw: waits for the tokens; None: no draw has been queued.
        logits: of `sampling`, then of `reading`.
        is_in_flight: whether the next step is planned before its tokens have come.
        late: requests that get no token, because the masks of their grammars have not come in time.
    """

    ready: float
    sampling: list[Request]
    reading: list[tuple[Request, int]]
    resumed: list[Request]
    num_decode_tokens: int
    num_prefill_tokens: int
    prefill_context: int
    scheduled: list[Request] = field(default_factory=list)
    drafts: Mapping[Request, Drafts] = field(default_factory=dict)
    num_rejected: dict[Request, int] = field(default_factory=dict)
    known_drafts: Callable[[], npt.NDArray[np.int64]] | None = None
    places: Draw | None = None
    draw: Callable[[], npt.NDArray[np.int64]] | None = None
    logits: Any = None
    is_in_flight: bool = False
    late: set[Request] = field(default_factory=set)

    @property
    def first_rows(self) -> list[int]:
        """First row of `logits` of each request of `sampling`, then the number of their rows."""
        counts = [1 + len(self.drafts.get(request, NO_DRAFTS)) for request in self.sampling]
        return list(accumulate(counts, initial=0))

    def count_ahead(self) -> None:
        """Count what its requests get before it has come, as if all drafts stood."""
        self.is_in_flight = True
        for row, request in enumerate(self.sampling):
            if request.finish_reason is None and request not in self.late:
                num_drafts = len(self.drafts.get(request, NO_DRAFTS))
                request.pending_row, request.num_unverified = row, num_drafts
                request.num_computed_tokens += num_drafts

    def leave_out(self, request: Request) -> None:
        """Give a request no token; its last token is computed again when the mask is there."""
        self.late.add(request)
        request.forget_draw()

    def going_on(
        self, sampling: Sequence[Request], is_sampled_here: bool, drop: Callable[[Request], object]
    ) -> list[int]:
        """Return the places of the requests that get a token.

        Others have ended since the launch, at the token before or at their prompt's scores, or
        their masks are late.

        Args:
            sampling: requests of the step.
            is_sampled_here: True if masks are needed now; False if a device has sampled.
            drop: called with requests that have ended with the token before, if that was not known.
        """
        found = []
        for place, request in enumerate(sampling):
            if request.finish_reason is not None or request in self.late:
                continue
            if request.grammar is not None:
                if is_sampled_here and not request.grammar.await_mask():
                    self.leave_out(request)
                    continue
                if request.grammar.is_finished:
                    # the worker was late to tell
                    request.end("stop")
                    drop(request)
                    continue
            found.append(place)
        return found

    def read_prompts(self) -> list[Request]:
        """Score tokens of prompts; `logits` are then those of `sampling` alone.

        Returns:
            Requests whose logits are unusable.
        """
        begin = self.first_rows[-1]
        logits, self.logits = self.logits, self.logits[:begin]
        failed = []
        for request, count in self.reading:
            scores = request.prompt_logprobs
            if scores is not None and not scores.read(logits[begin : begin + count]):
                failed.append(request)
            begin += count
        return failed


def assemble(
    batch: InputBatch, scheduled: list[Request], drafts: Mapping[Request, Drafts]
) -> tuple[list[Request], list[tuple[Request, int]], npt.NDArray[np.int64]]:
    """Fill the input batch with a step.

    Args:
        batch: of the runner.
        scheduled, drafts: of the scheduler.

    Returns:
        The requests that sample, those whose prompt is scored and of how many tokens, and the
        flat rows of the logits of both, in this order; one that samples has a row more for each
        of its drafts.
    """
    batch.begin_step()
    slots, lengths, computed, are_prefills = list[int](), list[int](), list[int](), list[bool]()
    ids, pending = list[int](), dict[int, int]()
    sampling: list[Request] = []
    sampled: list[int] = []
    reading, read = [], []
    for request in scheduled:
        first, begin = len(ids), request.num_computed_tokens
        end = begin + request.num_scheduled_tokens
        samples = end == request.num_tokens
        slots.append(request.slot)
        computed.append(begin)
        # as Request.is_decode, of the chunk: only the token sampled last is missing
        is_decode = samples and end - begin == 1 and request.num_output_tokens > 0
        are_prefills.append(not is_decode)
        if request.pending_row < 0:
            ids += request.token_ids[begin:end]
        else:
            pending[len(ids)] = request.pending_row
            ids.append(0)
        last = len(ids) - 1
        if samples:
            sampling.append(request)
            own = drafts.get(request, NO_DRAFTS)
            if own.is_pending:
                pending.update(enumerate(own.tokens, len(ids)))
            ids += [0] * len(own) if own.is_pending else own.tokens
            sampled += range(last, len(ids))
        else:
            batch.following[last] = request.token_ids[end]
        lengths.append(len(ids) - first)
        if request.prompt_logprobs is not None:
            unread = request.prompt_logprobs.unread(begin, end)
            if unread:
                reading.append((request, len(unread)))
                read += [last + 1 - end + position for position in unread]
    batch.add_rows(slots, lengths, ids, computed, are_prefills, pending)
    batch.follows[slots] = [request.pending_row for request in scheduled]
    return sampling, reading, np.array(sampled + read, np.int64)


def execute_watched(
    runner: Runner, step: LaunchedStep, logits_indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Run a step; requests that ask for it get what the indexer chose for their last token.

    Args:
        runner: runs the step.
        step: whose requests sample; those that ask have no drafts.
        logits_indices: see Runner.
    """
    rows = zip(step.sampling, step.first_rows, strict=False)
    watched = {row: request for request, row in rows if request.params.return_topk_positions}
    if not watched:
        return runner.execute_model(logits_indices)
    shows = runner.info.selections
    assert shows is not None, "`limits` refuses such requests without it"
    logits, selections = shows.execute_watched(logits_indices, logits_indices[list(watched)])
    for request, layers in zip(watched.values(), selections, strict=True):
        request.topk_positions = TopkPositions(len(request.token_ids) - 1, layers)
    return logits


def offer_tokens(sampling: Sequence[Request], token_ids: Sequence[int]) -> None:
    """Have the workers of grammars take sampled tokens, all workers at the same time.

    Args:
        token_ids: tokens of the requests, negative = none.
    """
    grammars = []
    for request, token_id in zip(sampling, token_ids, strict=True):
        if request.grammar is not None and token_id >= 0:
            request.grammar.offer(token_id)
            grammars.append(request.grammar)
    for grammar in grammars:
        grammar.send()
