"""A simulator of an engine that runs a builder of V4 index arrays on tagged memory.

    simulate(Sizes(swa="paged"), naive, seed=7, num_steps=50)

plays one random history: requests arrive, run in chunks, draft tokens, leave, come back. It raises
Violation where a layer would read a key that is not exactly the one it must read, or write where it
must not.

A tag names one version of one token: a rejected draft and the token that replaces it have
different tags. Requests with a common prefix hold the same tags there, as they hold the same keys.
A compressed entry carries the tag of the last token that it pools, and the bit of its kind. Freed
memory is poisoned, so a read of it cannot be right.

Prefix hits. With pages, a hit keeps the blocks, and the sources that the next entries pool come
from where the engine stored them. With rings nothing of the window is kept, so the last block of
the hit runs once more, in a step of its own: its tokens lack the window below their block, and the
first entry that they pool lacks its older half. What they write is therefore never shared: it goes
into a block that is dropped after the step for the one of the hit. Every later token reads right
keys only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import numpy as np

from tests.v4_prepare.simulator_layers import Memory, Violation, run_layers

Build = Callable[..., Any]
"""`(cfg, ctx, q, slot, block_table)` -> arrays by attribute or by name."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step, under the names of V4PrepareConfig; small by default."""

    window_size: int = 8
    spec_tokens: int = 3
    block_size: int = 16
    csa_ratio: int = 4
    hca_ratio: int = 16
    index_topk: int = 3
    num_slots: int = 5
    num_blocks: int = 26
    max_blocks_per_seq: int = 7
    max_num_seqs: int = 4
    max_num_tokens: int = 48
    max_tokens_per_seq: int = 40
    max_model_len: int = 112
    swa: str = "ring"
    comp_base: int | None = None
    hca_mode: str | None = None


@dataclass(eq=False)
class Request:
    """One request: where it stands, and what it holds.

    Attributes:
        handle: its row of `Engine.contents`, its own while it lives.
        prompt: tokens known before decoding; after a preemption, all that were run.
        done: tokens that are valid in the cache.
        rerun_until: while positive, the next step runs tokens up to here for their ring alone.
        hit_block: the block of the prefix cache that replaces the last one after that step.
        refused: drafts of this request refused in the step before.
    """

    handle: int
    prompt: int
    final: int
    done: int = 0
    slot: int = -1
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
    rollback: np.ndarray
    table: np.ndarray
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
        self.handle = np.array([r.handle if r else 0 for r in self.requests], np.int64)[row]
        self.tag = self.contents[self.handle, self.position]
        self.is_prefill = self.q[row] > self.spec_tokens + 1
        reruns = np.array([bool(r and r.rerun_until) for r in self.requests], bool)
        self.missing_below = np.where(reruns[row], start, 0)


class Engine:
    """Requests of the steps, their memory, and what becomes of them.

    Attributes:
        contents: int64 [handles, Lmax], the truth: the tag of each position of each request.
        cached: tag of a full block's last token -> the block; blocks are shared by prefix hits.
        events: how often what happened, by name.
    """

    def __init__(self, cfg: Any, rng: Random, late: bool) -> None:
        """`late`: the host learns of refused drafts one step late and reserves for all of them."""
        self.cfg, self.rng, self.late, self.memory = cfg, rng, late, Memory(cfg)
        num_handles = cfg.max_num_seqs + 2
        self.contents = np.full((num_handles, cfg.max_model_len), -1, np.int64)
        self.handles, self.num_tags = list(range(num_handles)), 0
        self.free_slots, self.free_blocks = list(range(cfg.num_slots)), list(range(cfg.num_blocks))
        self.refs, self.cached = [0] * cfg.num_blocks, dict[int, int]()
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

    # blocks

    def take(self, handle: int) -> int | None:
        """A block for this request alone; None where all are in use."""
        while not self.free_blocks and self.cached:
            self.release(self.cached.pop(self.rng.choice(list(self.cached))))
        if not self.free_blocks:
            return None
        # blocks freed last come back first, mostly
        is_last = self.rng.random() < 0.7
        block = self.free_blocks.pop(-1 if is_last else self.rng.randrange(len(self.free_blocks)))
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
            self.free_blocks.append(block)

    def _reserve(self, request: Request, length: int) -> bool:
        """Blocks for so many tokens; False where there are too few."""
        while len(request.blocks) * self.cfg.block_size < length:
            block = self.take(request.handle)
            if block is None:
                return False
            request.blocks.append(block)
        return True

    # arrivals

    def _name(self, request: Request, start: int, end: int) -> None:
        """New tokens, at positions start..end-1 of a request."""
        tags = np.arange(self.num_tags, self.num_tags + end - start)
        self.contents[request.handle, start:end] = tags
        self.num_tags += end - start

    def _arrive(self) -> None:
        """A new request, often with the beginning of an earlier one."""
        cfg, rng = self.cfg, self.rng
        # the last step may draft beyond the end, and count on drafts that were refused
        longest = cfg.max_model_len - cfg.spec_tokens * (2 if self.late else 1) - 1
        sizes = [cfg.window_size, cfg.spec_tokens + 2, 3 * cfg.block_size, longest, longest]
        prompt = rng.randint(1, min(rng.choice(sizes), longest))
        final = min(longest + 1, prompt + rng.randint(1, 2 * cfg.block_size))
        request = Request(self.handles.pop(), prompt, final)
        self.events["arrivals"] += 1
        self._name(request, 0, prompt)
        if self.prefixes and rng.random() < 0.7:
            length = rng.choice([prompt, prompt, rng.randint(1, prompt)])
            common = rng.choice(self.prefixes)[:length]
            self.contents[request.handle, : len(common)] = common
        self.waiting.append(request)

    def _admit(self, request: Request) -> None:
        """Give it a slot and a row, and what of its prompt is cached."""
        rng, size = self.rng, self.cfg.block_size
        request.slot = self.free_slots.pop(-1 if rng.random() < 0.7 else 0)
        self.memory.slot_owner[request.slot] = request.handle
        self.rows[rng.choice([b for b, r in enumerate(self.rows) if r is None])] = request
        # the last token of a prompt is always left to run
        hits, tokens = [], self.contents[request.handle].tolist()
        for end in range(size, request.prompt, size):
            if tokens[end - 1] not in self.cached:
                break
            hits.append(self.cached[tokens[end - 1]])
        self._take_hit(request, hits)

    def _take_hit(self, request: Request, hits: list[int]) -> None:
        """Start after the hit: with pages at once, with a ring once its last block ran again."""
        cfg, hit = self.cfg, len(hits) * self.cfg.block_size
        if cfg.swa == "paged" and hits:
            request.blocks = [self.share(block) for block in hits]
            request.done = hit
            self.events["hits"] += 1
            self.memory.install_states(self.contents[request.handle, :hit], request.slot)
        elif hits and cfg.spec_tokens + 1 < cfg.block_size <= cfg.max_tokens_per_seq:
            request.blocks = [self.share(block) for block in hits[:-1]]
            request.hit_block = self.share(hits[-1])
            request.done, request.rerun_until = hit - cfg.block_size, hit
            self.events["hits"] += 1
            self.events["blocks run again without a window"] += len(hits) > 1
        request.num_cached = len(request.blocks)

    def _leave(self, row: int) -> Request:
        """Take a request out of its row; its slot and its blocks are free."""
        request = self.rows[row]
        assert request is not None
        self.rows[row] = None
        for block in [*request.blocks, *([request.hit_block] if request.hit_block >= 0 else [])]:
            self.release(block)
        self.memory.free_slot(request.slot)
        self.free_slots.append(request.slot)
        request.blocks, request.slot, request.hit_block = [], -1, -1
        request.rerun_until = request.refused = request.num_cached = 0
        return request

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
            request = self.rows[row]
            if request and rng.random() >= self.idle:
                q[row] = self._num_tokens(row, request, self.cfg.max_num_tokens - sum(q))
        return self._inputs(q)

    def _num_tokens(self, row: int, request: Request, room: int) -> int:
        """Return the tokens that a request runs with all its memory reserved, or 0."""
        cfg, rng = self.cfg, self.rng
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
        if not number or self._reserve(request, request.done + number + refused):
            return number
        if rng.random() < 0.5:
            # preempted: it waits, and runs all its tokens again later
            self.waiting.append(self._leave(row))
            request.prompt, request.done = max(request.prompt, request.done), 0
            self.events["preemptions"] += 1
        return 0

    def _inputs(self, q: list[int]) -> Step:
        """The arrays of the step; new tokens get their names."""
        rng, cfg = self.rng, self.cfg
        used = max((b + 1 for b, r in enumerate(self.rows) if r), default=0)
        num_rows = rng.choice([used, len(self.rows)])
        lengths = np.zeros((4, num_rows), np.int32)
        for row, request in enumerate(self.rows[:num_rows]):
            if not self.keeps_stale_cells or request:
                self.table[row] = -1
            if request is None:
                lengths[:, row] = rng.choice([0, cfg.window_size]), 0, -1, 0
                continue
            self.table[row, : len(request.blocks)] = request.blocks
            end = request.done + q[row]
            if end > request.prompt:
                self._name(request, request.done, end)
            # the slot of an idle row means nothing, be it that of another
            slot = request.slot if q[row] else rng.choice([-1, 0, request.slot])
            lengths[:, row] = end, q[row], slot, request.refused if self.late else 0
        requests = self.rows[:num_rows]
        table = self.table[:num_rows].copy()
        return Step(*lengths, table, requests, self.contents, cfg.spec_tokens)

    def finish_step(self, step: Step) -> None:
        """Accept some drafts of every row, refuse the others; cache the blocks that are full."""
        self.events["steps"] += 1
        self.events["empty steps"] += step.num_tokens == 0
        self.events["mixed steps"] += len(set(step.is_prefill.tolist())) == 2
        for request, q in zip(step.requests, step.q.tolist(), strict=True):
            if request is None:
                continue
            request.refused = 0
            if not q:
                continue
            if request.rerun_until:
                # the ring is filled: the block of the hit takes the place of the one just written
                self.release(request.blocks.pop())
                request.blocks.append(request.hit_block)
                request.num_cached += 1
                request.done, request.rerun_until, request.hit_block = request.rerun_until, 0, -1
            elif request.done + q <= request.prompt:
                request.done += q
            else:
                accepted = 1
                while accepted < q and self.rng.random() < self.acceptance:
                    accepted += 1
                request.done += accepted
                request.refused = q - accepted
                self.events["drafts refused"] += request.refused
            self._cache_blocks(request)

    def _cache_blocks(self, request: Request) -> None:
        """Offer full blocks to some other prompts, and the tokens as their beginning."""
        size, tokens = self.cfg.block_size, self.contents[request.handle]
        while (request.num_cached + 1) * size <= request.done:
            n = request.num_cached = request.num_cached + 1
            key = int(tokens[n * size - 1])
            if self.rng.random() < 0.8 and key not in self.cached:
                self.cached[key] = self.share(request.blocks[n - 1])
                self.prefixes = [*self.prefixes[-7:], tokens[: n * size].copy()]


def simulate(
    cfg: Any,
    build: Build,
    seed: int,
    num_steps: int,
    *,
    late: bool = False,
    translate: Callable[..., Any] | None = None,
    engine: Callable[..., Engine] = Engine,
) -> Counter[str]:
    """Play one random history with the arrays of `build`.

    Args:
        cfg: sizes, any object with the fields of V4PrepareConfig; handed on to `build`.
        build: called once a step, in order; may keep and reuse its arrays.
        seed: of everything random.
        late: the host does not know yet which drafts were refused in the step before: `build` is
            called with the optimistic ctx and, as fifth array, the int32 [B] rollback.
        translate: `(out of build, block_table, local_topk)` -> rows of chosen entries of ratio 1.
        engine: an Engine, or one that makes a mistake.

    Returns:
        How often what happened, by name.

    Raises:
        Violation: with the step at which it was found.
    """
    played, orders = engine(cfg, Random(seed), late), np.random.default_rng(seed)
    for number in range(num_steps):
        step = played.next_step()
        inputs = step.staged_ctx if late else step.ctx, step.q, step.slot, step.table
        out = build(cfg, *inputs, *([step.rollback] if late else []))
        try:
            run_layers(played.memory, step, out, orders, translate and partial(translate, out))
        except Violation as error:
            error.add_note(f"seed {seed}, step {number}, {cfg}\n{inputs} {step.rollback}")
            raise
        played.finish_step(step)
    return played.events
