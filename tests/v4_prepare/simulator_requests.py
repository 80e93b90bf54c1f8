"""Random traffic of an engine: requests arrive, run in chunks, draft tokens, leave, come back.

What the scheduler knows is the truth that the arrays of a builder are compared with: which version
of which token belongs at each position of each request.

Prefix hits. With pages, a hit keeps the blocks, and the sources that the next entries pool come
from where the engine stored them. With rings nothing of the window is kept, so the last block of
the hit runs once more, in a step of its own: its tokens lack the window below their block, and the
first entry that they pool lacks its older half. What they write is therefore never shared: it goes
into a block that is dropped after the step for the one of the hit. Every later token reads right
keys only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from tests.v4_prepare.simulator_memory import Memory, make_tags


@dataclass(eq=False)
class Request:
    """One request: where it stands, and what it holds.

    Attributes:
        handle: its row of `Scheduler.contents`, its own while it lives.
        prompt: tokens known before decoding; after a preemption, all that were run.
        done: tokens that are valid in the cache.
        rerun_until: while positive, the next step runs tokens up to here for their ring alone.
        hit_block: the block of the prefix cache that replaces the last one after that step.
        refused: drafts of this request refused in the step before.
    """

    number: int
    handle: int
    prompt: int
    final: int
    done: int = 0
    slot: int = -1
    version: int = 0
    rerun_until: int = 0
    hit_block: int = -1
    refused: int = 0
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Step:
    """Inputs of one step, and the truth about its tokens.

    Attributes:
        ctx, q, slot, table: int32 [B], and [B, columns].
        rollback: int32 [B] drafts refused in the step before; `ctx` is already without them.
        staged_ctx: int32 [B] what a host knows that counts them as kept; an idle row keeps its ctx.
        contents: int64 [handles, Lmax] tag of every position of every request.
        row, position, handle, tag, is_prefill: of every token [T].
        missing_below: [T] positions below it are not in the ring (a step that runs again).
    """

    ctx: np.ndarray
    q: np.ndarray
    slot: np.ndarray
    table: np.ndarray
    rollback: np.ndarray
    requests: list[Request | None]
    contents: np.ndarray
    spec_tokens: int

    def __post_init__(self) -> None:
        self.cu_q = np.concatenate([[0], np.cumsum(self.q)]).astype(np.int64)
        self.num_tokens = int(self.cu_q[-1])
        self.staged_ctx = self.ctx + np.where(self.q > 0, self.rollback, 0).astype(np.int32)
        row = self.row = np.repeat(np.arange(len(self.q)), self.q)
        start = (self.ctx - self.q)[row].astype(np.int64)
        self.position = start + np.arange(self.num_tokens) - self.cu_q[row]
        handles = np.array([r.handle if r else 0 for r in self.requests], np.int64)
        self.handle = handles[row]
        self.tag = self.contents[self.handle, self.position]
        self.is_prefill = self.q[row] > self.spec_tokens + 1
        reruns = np.array([bool(r and r.rerun_until) for r in self.requests], bool)
        self.missing_below = np.where(reruns[row], start, 0)


class Blocks:
    """Physical blocks: who holds them, and which prefixes they are cached for."""

    def __init__(self, cfg: Any, memory: Memory, rng: Random) -> None:
        self.memory, self.rng = memory, rng
        self.refs = [0] * cfg.num_blocks
        self.free = list(range(cfg.num_blocks))
        self.cached: dict[int, int] = {}

    def take(self, handle: int) -> int | None:
        """A block for this request alone; None where all are in use."""
        while not self.free and self.cached:
            victim = self.rng.choice(list(self.cached))
            self.release(self.cached.pop(victim))
        if not self.free:
            return None
        # blocks freed last come back first, mostly
        block = self.free.pop(-1 if self.rng.random() < 0.7 else self.rng.randrange(len(self.free)))
        self.refs[block] = 1
        self.memory.block_writer[block] = handle
        return block

    def share(self, block: int) -> int:
        """One more holder; from now on nobody writes into the block."""
        self.refs[block] += 1
        self.memory.block_writer[block] = -1
        return block

    def release(self, block: int) -> None:
        """One holder less; the last one frees the block."""
        self.refs[block] -= 1
        if not self.refs[block]:
            self.memory.free_block(block)
            self.free.append(block)


class Scheduler:
    """Which requests run in a step, and what becomes of them after it.

    Attributes:
        received: how often the beginning of a prompt ran elsewhere and its caches arrive filled.
        events: how often what happened, by name.
    """

    received = 0.1

    def __init__(self, cfg: Any, memory: Memory, rng: Random, late: bool) -> None:
        """`late`: the host learns of refused drafts one step late and reserves for all of them."""
        self.cfg, self.memory, self.rng, self.late = cfg, memory, rng, late
        self.blocks = Blocks(cfg, memory, rng)
        num_handles = cfg.max_num_seqs + 2
        self.contents = np.full((num_handles, cfg.max_model_len), -1, np.int64)
        self.handles = list(range(num_handles))
        self.free_slots = list(range(cfg.num_slots))
        self.rows: list[Request | None] = [None] * cfg.max_num_seqs
        self.waiting: list[Request] = []
        # token sequences that later prompts may begin with
        self.prefixes: list[np.ndarray] = []
        self.events: Counter[str] = Counter()
        self.table = np.full((cfg.max_num_seqs, cfg.max_blocks_per_seq), -1, np.int32)
        # habits of this history
        self.idle = rng.choice([0.0, 0.1, 0.4])
        self.moves_rows = rng.random() < 0.3
        self.keeps_stale_cells = rng.random() < 0.5
        self.acceptance = rng.choice([0.0, 0.5, 0.9])

    # arrivals

    def _arrive(self) -> None:
        """A new request, often with the beginning of an earlier one."""
        cfg, rng = self.cfg, self.rng
        # the last step may draft beyond the end, and count on drafts that were refused
        longest = cfg.max_model_len - cfg.spec_tokens * (2 if self.late else 1) - 1
        sizes = [cfg.spec_tokens + 2, 3 * cfg.block_size, longest, longest]
        bound = rng.choice([cfg.window_size, *sizes])
        prompt = rng.randint(1, min(bound, longest))
        request = Request(self.events["arrivals"], self.handles.pop(), prompt, 0)
        self.events["arrivals"] += 1
        request.final = min(longest + 1, prompt + rng.randint(1, 2 * cfg.block_size))
        row = self.contents[request.handle]
        row[:prompt] = make_tags(request.number, np.arange(prompt), 0)
        if self.prefixes and rng.random() < 0.7:
            common = rng.choice(self.prefixes)[
                : rng.choice([prompt, prompt, rng.randint(1, prompt)])
            ]
            row[: len(common)] = common
        self.waiting.append(request)

    def _admit(self, request: Request) -> None:
        """Give it a slot and a row, and what of its prompt is cached."""
        rng = self.rng
        request.slot = self.free_slots.pop(-1 if rng.random() < 0.7 else 0)
        self.memory.slot_owner[request.slot] = request.handle
        empty = [b for b, r in enumerate(self.rows) if r is None]
        self.rows[rng.choice(empty)] = request
        if rng.random() < self.received:
            self._receive(request)
        else:
            self._take_hit(request, self._hits(request))

    def _hits(self, request: Request) -> list[int]:
        """Cached blocks that the prompt begins with; its last token is always left to run."""
        found: list[int] = []
        size, tokens = self.cfg.block_size, self.contents[request.handle]
        while (len(found) + 1) * size < request.prompt:
            block = self.blocks.cached.get(int(tokens[(len(found) + 1) * size - 1]))
            if block is None:
                break
            found.append(block)
        return found

    def _take_hit(self, request: Request, hits: list[int]) -> None:
        """Start after the hit: with pages at once, with a ring once its last block ran again."""
        cfg, hit = self.cfg, len(hits) * self.cfg.block_size
        if cfg.swa == "paged" and hits:
            request.blocks = [self.blocks.share(block) for block in hits]
            request.done = hit
            self.events["hits"] += 1
            self.memory.install_states(self.contents[request.handle, :hit], request.slot)
        elif hits and cfg.spec_tokens + 1 < cfg.block_size <= cfg.max_tokens_per_seq:
            request.blocks = [self.blocks.share(block) for block in hits[:-1]]
            request.hit_block = self.blocks.share(hits[-1])
            request.done, request.rerun_until = hit - cfg.block_size, hit
            self.events["hits"] += 1
            self.events["blocks run again without a window"] += len(hits) > 1
        request.num_cached = len(request.blocks)

    def _receive(self, request: Request) -> None:
        """Its prompt ran elsewhere up to some token; the caches arrive filled."""
        length = self.rng.randint(0, request.prompt - 1)
        if length and self._reserve(request, length):
            tokens = self.contents[request.handle, :length]
            self.memory.install(tokens, request.slot, request.blocks)
            request.done = length
            self.events["caches received"] += 1

    def _reserve(self, request: Request, length: int) -> bool:
        """Blocks for so many tokens; False where there are too few."""
        while len(request.blocks) * self.cfg.block_size < length:
            block = self.blocks.take(request.handle)
            if block is None:
                return False
            request.blocks.append(block)
        return True

    def _leave(self, row: int) -> Request:
        """Take a request out of its row; its slot and its blocks are free."""
        request = self.rows[row]
        assert request is not None
        self.rows[row] = None
        for block in request.blocks:
            self.blocks.release(block)
        if request.hit_block >= 0:
            self.blocks.release(request.hit_block)
        self.memory.free_slot(request.slot)
        self.free_slots.append(request.slot)
        request.blocks, request.slot, request.hit_block = [], -1, -1
        request.rerun_until = request.refused = request.num_cached = 0
        return request

    def _preempt(self, row: int) -> None:
        """Out of memory: the request waits and runs all its tokens again later."""
        request = self._leave(row)
        request.prompt = max(request.prompt, request.done)
        request.done = 0
        self.waiting.append(request)
        self.events["preemptions"] += 1

    # one step

    def next_step(self) -> Step:
        """Choose the rows of the next step and the tokens that they run."""
        rng = self.rng
        for row, request in enumerate(self.rows):
            if request and (request.done >= request.final or rng.random() < 0.01):
                self.handles.append(self._leave(row).handle)
        while self.handles and len(self.waiting) < 2 and rng.random() < 0.4:
            self._arrive()
        while self.waiting and self.free_slots and None in self.rows and rng.random() < 0.7:
            self._admit(self.waiting.pop(0))
        if self.moves_rows:
            rng.shuffle(self.rows)
        q = [0] * len(self.rows)
        for row in rng.sample(range(len(q)), len(q)):
            if self.rows[row] and rng.random() >= self.idle:
                q[row] = self._num_tokens(row, self.cfg.max_num_tokens - sum(q))
        return self._inputs(q)

    def _num_tokens(self, row: int, room: int) -> int:
        """How many tokens the request of a row runs, all its memory reserved; 0 = none."""
        cfg, rng, request = self.cfg, self.rng, self.rows[row]
        assert request is not None
        most = min(room, cfg.max_tokens_per_seq)
        if request.rerun_until:
            number = request.rerun_until - request.done
            number = number if number <= most else 0
        elif request.done < request.prompt:
            most = min(most, request.prompt - request.done)
            number = min(most, rng.choice([most, rng.randint(1, cfg.max_tokens_per_seq)]))
        else:
            number = min(most, 1 + rng.randint(0, cfg.spec_tokens))
        refused = request.refused if self.late else 0
        if number and not self._reserve(request, request.done + number + refused):
            number = 0
            if rng.random() < 0.5:
                self._preempt(row)
        return number

    def _inputs(self, q: list[int]) -> Step:
        """The arrays of the step; new tokens get their names."""
        rng, cfg = self.rng, self.cfg
        used = max((b + 1 for b, r in enumerate(self.rows) if r), default=0)
        num_rows = rng.choice([used, len(self.rows)])
        ctx, slot, rollback = [], [], []
        for row, request in enumerate(self.rows[:num_rows]):
            if not self.keeps_stale_cells or request:
                self.table[row] = -1
            if request is None:
                ctx.append(rng.choice([0, cfg.window_size]))
                slot.append(-1)
                rollback.append(0)
                continue
            self.table[row, : len(request.blocks)] = request.blocks
            end = request.done + q[row]
            if end > request.prompt:
                request.version += 1
                new = np.arange(request.done, end)
                names = make_tags(request.number, new, request.version)
                self.contents[request.handle, request.done : end] = names
            ctx.append(end)
            # the slot of an idle row means nothing, be it that of another
            slot.append(request.slot if q[row] else rng.choice([-1, 0, request.slot]))
            rollback.append(request.refused if self.late else 0)
        as_int32 = [np.array(x, np.int32) for x in (ctx, q[:num_rows], slot)]
        table, refused = self.table[:num_rows].copy(), np.array(rollback, np.int32)
        requests = self.rows[:num_rows]
        return Step(*as_int32, table, refused, requests, self.contents, cfg.spec_tokens)

    def finish_step(self, step: Step) -> None:
        """Accept some drafts of every row, refuse the others; cache the blocks that are full."""
        self.events["steps"] += 1
        self.events["tokens"] += step.num_tokens
        self.events["empty steps"] += step.num_tokens == 0
        self.events["mixed steps"] += len(set(step.is_prefill.tolist())) == 2
        for request, q in zip(step.requests, step.q.tolist(), strict=True):
            if request is None:
                continue
            request.refused = 0
            if not q:
                continue
            if request.rerun_until:
                self._end_rerun(request)
            elif request.done + q <= request.prompt:
                request.done += q
            else:
                accepted = 1
                while accepted < q and self.rng.random() < self.acceptance:
                    accepted += 1
                request.done += accepted
                request.refused = q - accepted
                self.events["drafts refused"] += request.refused
                self._trim(request)
            self._cache_blocks(request)

    def _end_rerun(self, request: Request) -> None:
        """The ring is filled: the block of the hit takes the place of the one just written."""
        self.blocks.release(request.blocks.pop())
        request.blocks.append(request.hit_block)
        request.num_cached += 1
        request.done, request.rerun_until, request.hit_block = request.rerun_until, 0, -1

    def _trim(self, request: Request) -> None:
        """Sometimes blocks that only refused drafts needed go back at once."""
        if not self.late and self.rng.random() < 0.3:
            while (len(request.blocks) - 1) * self.cfg.block_size >= request.done:
                self.blocks.release(request.blocks.pop())

    def _cache_blocks(self, request: Request) -> None:
        """Sometimes offer full blocks to other prompts, and the tokens as their beginning."""
        size, tokens = self.cfg.block_size, self.contents[request.handle]
        while (request.num_cached + 1) * size <= request.done:
            n = request.num_cached = request.num_cached + 1
            key = int(tokens[n * size - 1])
            if self.rng.random() < 0.8 and key not in self.blocks.cached:
                self.blocks.cached[key] = self.blocks.share(request.blocks[n - 1])
                self.prefixes = [*self.prefixes[-7:], tokens[: n * size].copy()]


class LongContexts(Scheduler):
    """Most prompts have run elsewhere."""

    received = 0.7
