"""Choice of the requests of the next step, and of the number of their tokens."""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from operator import attrgetter

from fd_dsa.engine.admission import Admission
from fd_dsa.engine.batch import NO_DRAFTS, Drafts, ScheduledBatch
from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.output import FinishReason
from fd_dsa.engine.request import Request
from fd_dsa.engine.step_times import StepShape, StepTable, StepTimeModel
from fd_dsa.errors import describe_error
from fd_dsa.runner.input_batch import NO_SLOT, InputBatch

logger = logging.getLogger(__name__)

_batch_row = attrgetter("batch_row")


class Scheduler:
    """Continuous batching with chunked prefill, in order of arrival.

    Rules:
        - Decoding requests come first, with one token each. Prefill fills the rest of the token
          budget. Decoding requests always fit, because each took part in the step before.
        - With a target for the inter-token latency, measured step times limit the prefill tokens of
          a step with decoding requests. It takes at least the smallest chunk. A step without
          decoding requests takes all that fit.
        - A request is admitted when a row is free and the blocks of all its known tokens are free
          or cached. One spare block for each running request must be left. Admission is strictly in
          order of arrival, so every running request has arrived before every waiting one.
        - A request whose blocks come from host memory is admitted when they are copied, or when no
          other request runs. If a running request needs a block meanwhile, it takes them.
        - A request whose grammar is being compiled in another thread is not admitted, and requests
          after it are not admitted either. Running requests go on.
        - A request whose mask is late is not scheduled until it has the mask.
        - The outputs of one request are admitted one at a time. While one of them computes or
          scores the prompt, the next ones and all later requests wait. Then they share its blocks.
        - A request is not scheduled again once its last allowed token is in flight. A request that
          was preempted with a token in flight is admitted again when the token has come.
        - Pending drafts count as tokens until they are verified. If a request with all of them ends
          or needs a block that is not free, it waits for their verification.
        - Tokens whose blocks are cached count as computed at each admission of a request.
        - A step has at most `max_num_seqs` rows of logits in addition to those of drafts: one for
          each batch row. Prompts that are scored use the rows that are left, and limit their chunks
          to them.
        - Drafts of decoding requests use tokens that prefill leaves, and blocks that are free in
          addition to one for each running request. Drafts that do not fit are left out. A draft is
          a token of the request only after it is accepted.
        - Only decoding needs further blocks. If no block is free, the latest running request is
          preempted: it loses its blocks and its row, and is computed again later. So the earliest
          request can always go on. The engine refuses requests that need more blocks than there
          are, so every request ends.

    Args:
        blocks: owner of the cache blocks.
        batch: has the numbers of rows and tokens of a step. The scheduler writes its block tables.
        stats: counts preemptions and prefix hits.
        target_gap_s: target inter-token latency, seconds; 0 = no target.
        lookahead: number of tokens after a block that must be known before the block is shared.
        step_table: measured step times; None = they are learned from the steps of requests.

    Attributes:
        proposals: drafts that follow the tokens of the newest step, by request.
        running: requests with a row by `seq_id`, in order of arrival.
        waiting: requests without a row, in order of arrival.
        free_rows: heap of the batch rows without a request.
    """

    def __init__(
        self,
        blocks: BlockManager,
        batch: InputBatch,
        stats: EngineStats,
        target_gap_s: float = 0.0,
        lookahead: int = 0,
        step_table: StepTable | None = None,
    ) -> None:
        self.proposals: dict[Request, Drafts] = {}
        self._may_draft, self._lookahead = True, lookahead
        self._blocks = blocks
        self._batch = batch
        self._stats = stats
        self._admission = Admission(blocks, stats)
        self._target_gap_s = target_gap_s
        self._step_times = StepTimeModel(batch.max_num_tokens, step_table) if target_gap_s else None
        # sizes of the step that is being scheduled
        self._shape = StepShape(0)
        self.free_rows = list(range(batch.max_num_seqs))
        self.running: dict[int, Request] = {}
        self.waiting: deque[Request] = deque()
        # requests that have their last allowed token, by `seq_id`; see `settled`
        self._unsettled: dict[int, Request] = {}
        # requests of the step until it is completed
        self._scheduled: list[Request] = []
        self._snapshot_slots: dict[Request, int] = {}
        self._held: list[Request] = []
        # lower limits after an out-of-memory error
        self._max_prefill_tokens, self._max_rows = batch.max_num_tokens, batch.max_num_seqs
        self._spare_logits = 0

    @property
    def num_running(self) -> int:
        """Requests with a row."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request, whose `seq_id` must be the largest so far."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Drop an ended or aborted request, and free its row and blocks."""
        self.proposals.pop(request, None)
        if request.grammar is not None:
            request.grammar.release()
            self._unsettled.pop(request.seq_id, None)
        if request.batch_row >= 0:
            self._release(request)
        else:
            self.waiting.remove(request)
            # it may have waited for copies
            self._blocks.free(request.seq_id)
        if not self.running and not self.waiting:
            self._max_prefill_tokens = self._batch.max_num_tokens
            self._max_rows = self._batch.max_num_seqs
            self._may_draft = True

    def schedule(self) -> ScheduledBatch | None:
        """Choose the requests of the next step, and set their `num_scheduled_tokens`.

        Returns:
            The step; None without requests, or while the grammar of the first waiting request is
            being compiled and all running requests wait for late masks.
        """
        self._drop_failed_step()
        self._scheduled, self._held, self._snapshot_slots = [], [], {}
        decoding: list[Request] = []
        prefilling: list[Request] = []
        for request in self.running.values():
            if request.is_unsettled:
                continue
            if request.grammar is not None and request.grammar.is_late:
                # the last token of a prompt counts in the budget of prefill
                if request.is_decode:
                    self._held.append(request)
            elif request.pending_row < 0 or request.num_output_tokens < request.max_tokens:
                (decoding if request.is_decode else prefilling).append(request)
            elif request.num_pending_drafts:
                self._held.append(request)
        budget = self._schedule_decode(decoding)
        self._shape = StepShape(len(self._scheduled))
        self._spare_logits = len(self.free_rows)
        for request in prefilling:
            room = self._room_for_chunk(budget, request.num_computed_tokens)
            # a decoding request may have preempted this one just now
            if room and request.batch_row >= 0:
                budget = self._schedule_chunk(request, room)
        if self.waiting:
            budget = self._admit(budget)
        if not self._scheduled:
            return None
        drafts = self._choose_drafts(budget) if self._may_draft else {}
        if self._blocks.tier is not None or self._blocks.snapshots is not None:
            self._blocks.enqueue_copies()
        self._scheduled.sort(key=_batch_row)
        return ScheduledBatch(self._scheduled, drafts, self._snapshot_slots, self._shape.context)

    def settled(self) -> list[tuple[Request, FinishReason]]:
        """Return requests that ended with their last allowed token, and how.

        The workers of their grammars were late to tell if the form is complete.
        """
        return [
            (request, "stop" if request.grammar.is_finished else "length")
            for request in self._unsettled.values()
            if request.grammar is not None and not request.grammar.is_late
        ]

    def complete_step(self, batch: ScheduledBatch) -> None:
        """Count the tokens of an enqueued step as computed, and cache its full blocks.

        Later steps read the blocks, and run after this one. A block is cached when all of its
        tokens are known.
        """
        block_size, snapshots = self._blocks.block_size, self._blocks.snapshots
        self._scheduled = []
        if snapshots is not None:
            snapshots.commit()
        for request in batch.requests:
            num_new, before = request.num_scheduled_tokens, request.num_computed_tokens
            request.num_computed_tokens = before + num_new
            if before % block_size + num_new >= block_size:
                # with pending drafts the row may have fewer tokens
                if snapshots is not None and not request.num_pending_drafts:
                    snapshots.take(
                        self._blocks.blocks_of(request.seq_id),
                        request.batch_row,
                        request.num_computed_tokens,
                        len(request.state.prompt_token_ids),
                    )
                self._cache_blocks(request)

    def shrink_after_oom(self, batch: ScheduledBatch, error: Exception) -> Request | None:
        """Make steps need less memory than one that has failed, until no request is left.

        The first cure is to leave drafts out. The next one halves prefill chunks. If those have
        one token, or the step has no prefill, fewer requests run at a time.

        Returns:
            The request to end, because it does not fit even alone; None if the next step needs
            less memory.
        """
        num_prompt_tokens = sum(r.num_scheduled_tokens for r in batch.requests if not r.is_decode)
        latest = next(reversed(self.running.values()))
        if batch.drafts:
            self._may_draft = False
            cure = "no drafts are verified now"
        elif num_prompt_tokens > 1:
            self._max_prefill_tokens = num_prompt_tokens // 2
            cure = f"prefill chunks have at most {self._max_prefill_tokens} tokens now"
        elif len(self.running) == 1:
            return latest
        else:
            self._preempt(latest)
            self._max_rows = len(self.running)
            cure = f"at most {self._max_rows} requests run at a time now"
        logger.warning("%s; %s", describe_error(error), cure)
        return None

    def handle_new_token(self, request: Request) -> None:
        """Cache the newest block of a request, if its new token has completed the block."""
        if request.is_unsettled:
            self._unsettled[request.seq_id] = request
        known = len(request.token_ids) - self._lookahead
        if request.batch_row >= 0 and known % self._blocks.block_size == 0:
            self._cache_blocks(request)

    def _cache_blocks(self, request: Request) -> None:
        """Make full blocks of computed and known tokens available to other requests."""
        known = min(request.num_computed_tokens, len(request.token_ids) - self._lookahead)
        self._blocks.cache_full_blocks(request.seq_id, request.block_keys, known)

    def record_step_time(self, batch: ScheduledBatch, seconds: float) -> None:
        """Record the time of a step, from which chunks of later steps are sized."""
        if self._step_times is not None:
            self._step_times.record(seconds, batch.shape)

    def _schedule_decode(self, decoding: list[Request]) -> int:
        """Schedule one token of each decoding request, and return the budget for prefill."""
        block_size, taken = self._blocks.block_size, self._scheduled
        for request in decoding:
            # an earlier request may have preempted this one just now; most last blocks have room
            if request.batch_row >= 0 and (
                request.num_computed_tokens % block_size or self._reserve_next_block(request)
            ):
                request.num_scheduled_tokens = 1
                taken.append(request)
        # requests that are held back need a token in the step after this one
        budget = self._batch.max_num_tokens - len(taken) - len(self._held)
        return min(budget, self._max_prefill_tokens)

    def _choose_drafts(self, budget: int) -> dict[Request, Drafts]:
        """Return the drafts of decoding requests that there is room for."""
        chosen = dict[Request, Drafts]()
        for request in self._scheduled[: self._shape.num_decode_tokens] if self.proposals else ():
            # the last token of an output is never computed
            max_drafts = min(budget, request.max_tokens - request.num_output_tokens - 1)
            drafts = self.proposals.get(request, NO_DRAFTS).first(max(max_drafts, 0))
            tokens = request.num_tokens + len(drafts)
            if drafts and not self._reserve_blocks(request, tokens, len(self.running)):
                room = len(self._blocks.blocks_of(request.seq_id)) * self._blocks.block_size
                drafts = drafts.first(room - request.num_tokens)
            if drafts:
                chosen[request] = drafts
                budget -= len(drafts)
        return chosen

    def _reserve_next_block(self, request: Request) -> bool:
        """Reserve the block for the next token, and preempt later requests for it if needed.

        Returns:
            False if the request is not scheduled now.
        """
        while not self._reserve_blocks(request, request.num_tokens):
            if request.num_pending_drafts:
                self._held.append(request)
                return False
            victim = next(reversed(self.running.values()))
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _reserve_blocks(self, request: Request, num_tokens: int, spare: int = 0) -> bool:
        """Grow the block table of a running request to `num_tokens`.

        Returns:
            False if there are not enough free blocks beyond `spare`.
        """
        added = self._blocks.allocate(request.seq_id, num_tokens, spare=spare)
        if added:
            start = self._blocks.num_needed(num_tokens) - len(added)
            self._batch.set_blocks(request.batch_row, added, start)
        return added is not None

    def _admit(self, budget: int) -> int:
        """Admit waiting requests in order of arrival while rows, blocks and tokens last.

        Returns:
            The rest of the token budget.
        """
        while self.waiting:
            request = self.waiting[0]
            # ask first, because the grammar is compiled while the request waits for a row
            if request.grammar is not None and not request.grammar.is_ready:
                break
            if request.pending_row >= 0 or request.is_unsettled:
                break
            if budget <= 0 or self._spare_logits <= 0 or len(self.running) >= self._max_rows:
                break
            reservation = self._admission.reserve(request, self.running)
            if reservation is None:
                break
            context = reservation.num_cached * self._blocks.block_size
            room = self._room_for_chunk(budget, context)
            if not room:
                break
            self.waiting.popleft()
            request.batch_row = heapq.heappop(self.free_rows)
            self._spare_logits -= 1
            self._batch.set_blocks(request.batch_row, reservation.blocks)
            self.running[request.seq_id] = request
            self._admission.start(request, reservation)
            budget = self._schedule_chunk(request, room)
        return budget

    def _room_for_chunk(self, budget: int, context: int) -> int:
        """Return the part of a budget that a chunk after `context` tokens may use."""
        times, num_decoding = self._step_times, self._shape.num_decode_tokens
        if times is None or not num_decoding or not budget:
            return budget
        if not self._shape.num_prefill_tokens:
            longest = max(request.num_tokens for request in self._scheduled)
            self._shape = StepShape(num_decoding, max_row_len=longest)
        return min(budget, times.longest_chunk(self._shape, context, self._target_gap_s))

    def _schedule_chunk(self, request: Request, budget: int) -> int:
        """Schedule a prefill chunk of at most `budget` tokens, and return the remaining budget."""
        num_tokens = min(len(request.token_ids) - request.num_computed_tokens, budget)
        if request.wants_prompt_logits:
            num_tokens = min(num_tokens, 1 + self._spare_logits)
            self._spare_logits -= num_tokens - 1
        begin, known = request.num_computed_tokens, len(request.token_ids)
        end = self._blocks.chunk_end(request.block_keys, begin, begin + num_tokens, known)
        request.num_scheduled_tokens = num_tokens = end - begin
        if self._blocks.snapshots is not None:
            blocks, row = self._blocks.blocks_of(request.seq_id), request.batch_row
            slot = self._blocks.snapshots.reserve(blocks, row, begin, end, known)
            if slot != NO_SLOT:
                self._snapshot_slots[request] = slot
        self._shape = self._shape.with_chunk(num_tokens, request.num_computed_tokens)
        self._scheduled.append(request)
        return budget - num_tokens

    def _drop_failed_step(self) -> None:
        """Preempt requests whose rows the last step has damaged, if it was not completed."""
        if self._blocks.snapshots is not None:
            self._blocks.snapshots.release()
        if not self._blocks.repeats_chunks:
            # layers that ran have kept keys of a chunk in place of older ones that it reads
            begun = [r for r in self._scheduled if r.num_computed_tokens and not r.is_decode]
            while any(request.batch_row >= 0 for request in begun):
                self._preempt(next(reversed(self.running.values())))

    def _preempt(self, request: Request) -> None:
        """Move a running request to the head of the queue, without computed tokens."""
        self._stats.num_preemptions += 1
        request.preempted_time = time.monotonic()
        self._release(request)
        request.num_computed_tokens = request.num_pending_drafts = 0
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        """Take row and blocks from a running request."""
        self._batch.clear_row(request.batch_row)
        heapq.heappush(self.free_rows, request.batch_row)
        request.batch_row = -1
        self._blocks.free(request.seq_id)
        del self.running[request.seq_id]
