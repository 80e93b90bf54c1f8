"""Which request takes part in the next step, and with how many tokens."""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.draft_state import NO_DRAFTS, Drafts
from fd_dsa.engine.launched_step import LaunchedStep
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.output import FinishReason
from fd_dsa.engine.request import Request
from fd_dsa.engine.step_times import StepTimes
from fd_dsa.errors import describe_error
from fd_dsa.runner.input_batch import InputBatch

logger = logging.getLogger(__name__)

_slot = attrgetter("slot")


class Scheduler:
    """Continuous batching with chunked prefill, in order of arrival.

    Rules:
        - Requests that decode come first, one token each; prefill fills what is left of the
          token budget. There are never more decoding requests than tokens: each of them took
          part in the step before.
        - With a target for the time between tokens, a step with decoding requests takes only so
          many prompt tokens as the measured step times allow, but never fewer than the smallest
          chunk: prompts go on too. A step without them takes all that fit.
        - A request is admitted when a row is free and the blocks of all its known tokens are
          free or cached, with one block to spare for each running request; strictly in order of
          arrival. So every running request has arrived before every waiting one.
        - A request whose grammar is being compiled, in another thread, is not admitted, nor are
          those after it, and running ones go on.
        - A request whose mask did not come in time is not scheduled until it has come.
        - The outputs of one request arrive one at a time. While one of them computes the
          prompt the next ones, and all after them, are not admitted; then they take its blocks.
        - A request whose last allowed token is on its way is not scheduled any more; one that was
          preempted with a token on its way is admitted again when that has come.
        - Drafts on their way count as tokens until it is known which of them stand. If with all of
          them a request ends, or needs a block that is not free, it waits for that.
        - Tokens whose blocks are cached count as computed when a request is admitted, for the
          first time or after it was preempted.
        - A step gives at most `max_num_seqs` rows of logits beside those of drafts: one for each
          row of the batch, and what is left to prompts that are scored, which are read in chunks of
          so many.
        - Drafts of decoding requests take what prompts leave of the tokens, and blocks that are
          free beside one for each running request; where they do not fit, they are left out. They
          are no tokens of the request before they are accepted.
        - Only decoding needs further blocks. When none is free, the latest running request is
          preempted: it gives its blocks and row back and is computed again later. The earliest
          one can thus always go on, and since no request needs more blocks than there are (the
          engine refuses such), every request ends.

    Args:
        blocks: owner of the cache blocks.
        batch: gives the numbers of rows and tokens of a step; its block tables are kept in step
            with the owners.
        stats: counts preemptions, and what is found in the prefix cache.
        target_gap_s: seconds between two tokens of a request that decodes; 0 = no target.
        lookahead: tokens that must be known after a block's own before others may share it.

    Attributes:
        proposals: drafts after the step launched last, of requests that took part in it.
        drafts: those of the step scheduled last.
        prefill_context: tokens before each prompt token of that step, on average.
        running: requests with a row by arrival number, in order of arrival.
        waiting: requests without a row, in order of arrival.
        free_slots: heap of the batch rows without a request.
    """

    def __init__(
        self,
        blocks: BlockManager,
        batch: InputBatch,
        stats: EngineStats,
        target_gap_s: float = 0.0,
        lookahead: int = 0,
    ) -> None:
        self.proposals: dict[Request, Drafts] = {}
        self.drafts: dict[Request, Drafts] = {}
        self._may_draft, self._lookahead = True, lookahead
        self._blocks = blocks
        self._batch = batch
        self._stats = stats
        self._target_gap_s = target_gap_s
        self._step_times = StepTimes(batch.max_num_tokens) if target_gap_s else None
        self.prefill_context = 0
        self.free_slots = list(range(batch.max_num_seqs))
        self.running: dict[int, Request] = {}
        self.waiting: deque[Request] = deque()
        # requests with their last allowed token by arrival number, see `settled`
        self._unsettled: dict[int, Request] = {}
        self._scheduled: list[Request] = []
        self._held: list[Request] = []
        # fewer after a step that found no memory
        self._most_prompt_tokens, self._most_rows = batch.max_num_tokens, batch.max_num_seqs
        self._spare_logits = 0
        self._num_decoding = 0

    @property
    def num_running(self) -> int:
        """Requests with a row."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; arrival numbers must grow."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Drop an ended or aborted request and free what it holds."""
        if request.grammar is not None:
            request.grammar.release()
            self._unsettled.pop(request.arrival, None)
        if request.slot >= 0:
            self._release(request)
        else:
            self.waiting.remove(request)
        if not self.running and not self.waiting:
            self._most_prompt_tokens = self._batch.max_num_tokens
            self._most_rows = self._batch.max_num_seqs
            self._may_draft = True

    def schedule(self) -> list[Request]:
        """Requests of the next step in ascending slot order, `num_scheduled_tokens` set.

        Empty only when there is no request, or the first one's grammar is being compiled and
        nothing runs but requests whose masks are late.
        """
        self._scheduled, self._held = [], []
        decoding: list[Request] = []
        prefilling: list[Request] = []
        for request in self.running.values():
            if request.is_unsettled:
                continue
            if request.grammar is not None and request.grammar.is_late:
                # the token of a prompt's end is one of the prompts' tokens
                if request.is_decode:
                    self._held.append(request)
            elif request.pending_row < 0 or request.num_output_tokens < request.max_tokens:
                (decoding if request.is_decode else prefilling).append(request)
            elif request.num_unverified:
                self._held.append(request)
        budget = self._schedule_decode(decoding)
        self._num_decoding = len(self._scheduled)
        self._spare_logits = len(self.free_slots)
        for request in prefilling:
            # a decoding request may have preempted it just now
            if budget and request.slot >= 0:
                budget = self._take(request, budget)
        if self.waiting:
            budget = self._admit(budget)
        if self._may_draft:
            self._add_drafts(budget)
        if self._step_times is not None and (prompts := self._scheduled[self._num_decoding :]):
            self.prefill_context = _mean_context(prompts)
        self._scheduled.sort(key=_slot)
        return self._scheduled

    def settled(self) -> list[tuple[Request, FinishReason]]:
        """Return requests that ended with their last allowed token, and how.

        The workers of their grammars were late to tell if the form is complete.
        """
        return [
            (request, "stop" if request.grammar.is_finished else "length")
            for request in self._unsettled.values()
            if request.grammar is not None and not request.grammar.is_late
        ]

    def complete_step(self) -> None:
        """The step that `schedule` made is launched: its tokens are computed, full blocks cached.

        What reads them runs after it. A block is cached when all of its tokens are known.
        """
        block_size = self._blocks.block_size
        for request in self._scheduled:
            num_new, before = request.num_scheduled_tokens, request.num_computed_tokens
            request.num_computed_tokens = before + num_new
            if before % block_size + num_new >= block_size:
                self._cache_blocks(request)

    def relieve(self, error: Exception) -> Request | None:
        """Have steps need less memory than the one scheduled, until no request is left.

        Drafts are left out; without any, prompts are read in chunks of half as many tokens; if
        they are of one, or none is read, fewer requests run at a time.

        Returns:
            The request that must end, since it needs too much alone; None: the next step needs
            less.
        """
        num_prompt_tokens = sum(r.num_scheduled_tokens for r in self._scheduled if not r.is_decode)
        latest = next(reversed(self.running.values()))
        if self.drafts:
            self.drafts, self._may_draft = {}, False
            cure = "no drafts are verified now"
        elif num_prompt_tokens > 1:
            self._most_prompt_tokens = num_prompt_tokens // 2
            cure = f"prompts are read in steps of at most {self._most_prompt_tokens} tokens now"
        elif len(self.running) == 1:
            return latest
        else:
            self._preempt(latest)
            self._most_rows = len(self.running)
            cure = f"at most {self._most_rows} requests run at a time now"
        logger.warning("%s; %s", describe_error(error), cure)
        return None

    def take_token(self, request: Request) -> None:
        """A token of a request has come; it may be the last of a block that is computed."""
        if request.is_unsettled:
            self._unsettled[request.arrival] = request
        known = len(request.token_ids) - self._lookahead
        if request.slot >= 0 and known % self._blocks.block_size == 0:
            self._cache_blocks(request)

    def _cache_blocks(self, request: Request) -> None:
        """Let others find what is computed of known tokens."""
        known = min(request.num_computed_tokens, len(request.token_ids) - self._lookahead)
        self._blocks.cache_full_blocks(request.arrival, request.block_keys, known)

    def observe(self, step: LaunchedStep, seconds: float) -> None:
        """Learn from the time of a step that has run how long later ones take."""
        if self._step_times is not None:
            self._step_times.observe(
                seconds, step.num_decode_tokens, step.num_prefill_tokens, step.prefill_context
            )

    def _schedule_decode(self, decoding: list[Request]) -> int:
        """Give one token to each decoding request; returns the tokens left for prompts."""
        block_size, taken = self._blocks.block_size, self._scheduled
        for request in decoding:
            # an earlier request may have preempted it just now; most last blocks have room
            if request.slot >= 0 and (
                request.num_computed_tokens % block_size or self._grow(request)
            ):
                request.num_scheduled_tokens = 1
                taken.append(request)
        # those held back have theirs in the step after
        budget = self._batch.max_num_tokens - len(taken) - len(self._held)
        return min(budget, self._most_prompt_tokens)

    def _add_drafts(self, budget: int) -> None:
        """Add to decoding requests the drafts that there is room for."""
        self.drafts = {}
        for request in self._scheduled[: self._num_decoding] if self.proposals else ():
            # the last token of an output is never computed
            most = min(budget, request.max_tokens - request.num_output_tokens - 1)
            drafts = self.proposals.get(request, NO_DRAFTS).first(max(most, 0))
            tokens = request.num_tokens + len(drafts)
            if drafts and not self._allocate(request, tokens, len(self.running)):
                room = len(self._blocks.blocks_of(request.arrival)) * self._blocks.block_size
                drafts = drafts.first(room - request.num_tokens)
            if drafts:
                self.drafts[request] = drafts
                budget -= len(drafts)

    def _grow(self, request: Request) -> bool:
        """Get the block for the next token, if need be from later requests; False: not now."""
        while not self._allocate(request, request.num_tokens):
            if request.num_unverified:
                self._held.append(request)
                return False
            victim = next(reversed(self.running.values()))
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _allocate(self, request: Request, num_tokens: int, spare: int = 0) -> bool:
        """Have the blocks of a running request hold so many tokens; False: too few are free."""
        added = self._blocks.allocate(request.arrival, num_tokens, spare=spare)
        if added:
            start = self._blocks.num_needed(num_tokens) - len(added)
            self._batch.set_blocks(request.slot, added, start)
        return added is not None

    def _admit(self, budget: int) -> int:
        """Start waiting requests in order of arrival while rows, blocks and tokens last.

        Returns:
            The tokens left.
        """
        while self.waiting:
            request = self.waiting[0]
            # asked first: it is compiled while the request waits for a row
            if request.grammar is not None and not request.grammar.is_ready:
                break
            if request.pending_row >= 0 or request.is_unsettled:
                break
            if budget <= 0 or self._spare_logits <= 0 or len(self.running) >= self._most_rows:
                break
            # the blocks of running requests; what is cached never covers all tokens
            spare = len(self.running)
            if spare >= self._blocks.num_free:
                break
            cached = self._find_computed_blocks(request)
            if cached is None:
                break
            added = self._blocks.allocate(request.arrival, len(request.token_ids), cached, spare)
            if added is None:
                break
            self.waiting.popleft()
            request.slot = heapq.heappop(self.free_slots)
            self._spare_logits -= 1
            self._batch.set_blocks(request.slot, added)
            self.running[request.arrival] = request
            self._count_hits(request, len(cached) * self._blocks.block_size)
            budget = self._take(request, budget)
        return budget

    def _find_computed_blocks(self, request: Request) -> list[int] | None:
        """Blocks that a waiting request may take over; None while its group computes them."""
        # cached tokens have no logits
        cached: list[int] = []
        if self._reads_prefix_cache(request):
            cached = self._blocks.find_cached_blocks(request.block_keys, len(request.token_ids))
        num_shared = (len(request.state.prompt_token_ids) - 1) // self._blocks.block_size
        if len(cached) >= num_shared:
            return cached
        running = [other for other in request.group if other.slot >= 0]
        for other in running:
            if other.num_computed_tokens >= num_shared * self._blocks.block_size:
                return list(self._blocks.blocks_of(other.arrival)[:num_shared])
        return None if running else cached

    def _reads_prefix_cache(self, request: Request) -> bool:
        """Whether a request may take over blocks of others."""
        return not (request.params.skip_reading_prefix_cache or request.wants_prompt_logits)

    def _count_hits(self, request: Request, num_cached_tokens: int) -> None:
        """Start a request after its cached tokens, which are counted at its first start only."""
        request.num_computed_tokens = num_cached_tokens
        if request.scheduled_time is not None:
            return
        request.state.num_cached_tokens = num_cached_tokens
        request.scheduled_time = time.monotonic()
        # the prompt of a group is looked for once
        is_counted = request.state.index == 0 and self._reads_prefix_cache(request)
        if self._blocks.enable_prefix_caching and is_counted:
            self._stats.prefix_cache_queries += len(request.state.prompt_token_ids)
            self._stats.prefix_cache_hits += num_cached_tokens

    def _take(self, request: Request, budget: int) -> int:
        """Put a request into the step with at most `budget` tokens; returns how many are left."""
        if self._step_times is not None and self._num_decoding:
            longest = self._step_times.longest_chunk(
                self._num_decoding, request.num_computed_tokens, self._target_gap_s
            )
            budget = min(budget, longest)
        num_tokens = min(len(request.token_ids) - request.num_computed_tokens, budget)
        if request.prompt_logprobs is not None and request.wants_prompt_logits:
            num_tokens = min(num_tokens, 1 + self._spare_logits)
            self._spare_logits -= num_tokens - 1
        request.num_scheduled_tokens = num_tokens
        self._scheduled.append(request)
        return budget - num_tokens

    def _preempt(self, request: Request) -> None:
        """Put a running request back to the head of the queue, with nothing computed."""
        self._stats.num_preemptions += 1
        request.preempted_time = time.monotonic()
        self._release(request)
        request.num_computed_tokens = request.num_unverified = 0
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        """Take row and blocks from a running request."""
        self._batch.clear_row(request.slot)
        heapq.heappush(self.free_slots, request.slot)
        request.slot = -1
        self._blocks.free(request.arrival)
        del self.running[request.arrival]


def _mean_context(prefilling: Sequence[Request]) -> int:
    """Tokens before each scheduled token in its request, on average; 0 without requests."""
    num_tokens = sum(request.num_scheduled_tokens for request in prefilling)
    if num_tokens == 0:
        return 0
    before = sum(r.num_scheduled_tokens * r.num_computed_tokens for r in prefilling)
    return before // num_tokens
