"""A runner without a model whose cache remembers what each slot was computed from."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fd_dsa.engine.batch import Drafts
from fd_dsa.engine.logit_rules import LogitRules
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampler import Sampler
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.ops.sampling.token_buffer import REJECTED
from fd_dsa.runner.input_batch import InputBatch, SamplingInputs
from fd_dsa.runner.protocol import RunnerInfo, StepFuture
from tests.engine.drafters import KnowingDrafter
from tests.runner.following import Follower

VOCAB_SIZE = 12
EOS = 1
NUM_CANDIDATES = 3
# what an interrupted step leaves in the slots that it wrote
GARBAGE = -7


class DeviceGone(Exception):
    """A step that failed on purpose."""


class CheckingRunner:
    """Each slot of the cache holds a hash of the salt and of all tokens up to its own.

    So a slot of another request, of another position, of another salt or from before an eviction
    is found when it is read. The logits of a token are a function of that hash: what is generated
    depends on the tokens in front alone.

    Args:
        input_batch: as the engine fills it.
        num_blocks: blocks of the cache.
        running: the requests by row, to know what the rows must hold.
        nan_share: one of so many histories has logits that are not finite; 0 = none.
        vocab_size: columns of the logits.
        num_copies: caches of all ranks together, which a step writes and reads alike.

    Attributes:
        cache: hashes [num_copies, num_blocks, block_size].
    """

    info = RunnerInfo()

    def __init__(
        self,
        input_batch: InputBatch,
        num_blocks: int,
        running: Callable[[], Mapping[int, Request]],
        nan_share: int = 0,
        vocab_size: int = VOCAB_SIZE,
        num_copies: int = 1,
    ) -> None:
        self.input_batch = input_batch
        self.vocab_size = vocab_size
        self.block_size = input_batch.block_size
        self.cache = np.full((num_copies, num_blocks, self.block_size), -1, np.int64)
        self._follower = Follower(input_batch)
        self.fails = False
        self.written: set[int] = set()
        self.num_tokens = 0
        self._running = running
        self._nan_share = nan_share
        self._hashes: dict[Request, list[int]] = {}
        # tokens that the engine does not know yet, and tokens in the cache before the step, by row
        self.on_the_way: dict[Request, list[int]] = {}
        self._cached = input_batch.num_computed_tokens

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Write the step's tokens, check all that its rows read, answer by what they hold."""
        self._follower.follow()
        batch = self.input_batch
        running = self._running()
        self._hashes = {r: self._hashes[r] for r in running.values() if r in self._hashes}
        self.written = set()
        self.num_tokens = batch.num_tokens
        seen: list[int] = []
        for row in range(batch.num_rows):
            if batch.num_scheduled_tokens[row]:
                seen += self._run_row(row, running[row], len(seen))
        assert len(seen) == batch.num_tokens
        if self.fails:
            self.cache[:, sorted(self.written)] = self._half_done(sorted(self.written))
            raise DeviceGone("the device is gone")
        logits = np.full((len(logits_indices), self.vocab_size), -30.0, np.float32)
        for row, index in zip(logits, logits_indices, strict=True):
            _set_logits(row, seen[index], self._nan_share)
        return logits

    def _run_row(self, row: int, request: Request, begin: int) -> list[int]:
        """Write and read one row; the hashes of its new tokens."""
        batch, size = self.input_batch, self.block_size
        cached = int(self._cached[row])
        num_new = int(batch.num_scheduled_tokens[row])
        given = batch.token_ids[begin : begin + num_new].tolist()
        end = cached + num_new
        token_ids = request.token_ids[:end]
        if request.pending_row >= 0:
            token_ids += self.on_the_way[request]
        hashes = self._hashes.setdefault(request, [])
        extend_hashes(hashes, token_ids, request.params.cache_salt)
        if len(token_ids) < end and not batch.num_chunk_tokens[row]:
            # drafts, which are forgotten with the step
            assert cached == len(token_ids) - 1, f"row {row} has drafts after other tokens"
            token_ids += given[1:]
            hashes = hashes.copy()
            extend_hashes(hashes, token_ids, request.params.cache_salt)
        assert given == token_ids[cached:], f"row {row} got other tokens"
        expected = np.array(hashes[:end], np.int64)
        table = batch.block_tables[row, : -(-end // size)]
        assert (table >= 0).all(), f"row {row} has no block for one of its {end} tokens"
        assert len(set(table.tolist())) == len(table), f"row {row} has a block twice"
        for block in set(table[cached // size :].tolist()):
            assert (batch.block_tables == block).sum() == 1, f"shared block {block} is written"
            assert block not in self.written, f"block {block} is written by two rows"
            self.written.add(block)
        positions = np.arange(end)
        blocks, offsets = table[positions // size], positions % size
        self.cache[:, blocks[cached:], offsets[cached:]] = expected[cached:]
        read = self.cache[:, blocks, offsets]
        wrong = np.flatnonzero((read != expected).any(0))
        assert not len(wrong), (
            f"request {request.seq_id} reads a wrong slot at token {wrong[0]} of {end}, "
            f"{cached} of them from the cache"
        )
        return hashes[cached:end]

    def _half_done(self, blocks: list[int]) -> np.ndarray:
        """Return the content of blocks after a step broke off, with garbage where it wrote."""
        batch, size = self.input_batch, self.block_size
        content = self.cache[:, blocks].copy()
        for row in np.flatnonzero(batch.num_scheduled_tokens):
            cached = int(self._cached[row])
            for position in range(cached, cached + int(batch.num_scheduled_tokens[row])):
                block = int(batch.block_tables[row, position // size])
                content[:, blocks.index(block), position % size] = GARBAGE
        return content


class DrawingRunner(CheckingRunner):
    """Draws tokens itself, as a runner on a device: a step may have tokens of the draw before.

    Attributes:
        drafts: tokens that are here alone.
    """

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._sampler = Sampler(self.input_batch.max_num_seqs)
        self.info = RunnerInfo(sampling=self)
        self.drafts: list[int] = []
        # newest token of each request of the draw before, and its tokens in the cache
        self._newest, self._known = np.zeros((2, 0), np.int64)
        # by how much less than planned that is, by row
        self._shifts = np.zeros(self.input_batch.max_num_seqs, np.int64)
        self._unsampled: Any = None
        # batch row -> its output as the device knows it, and a function that gives the sampler its
        # rules, if they change logits
        self._counted: dict[int, tuple[list[int], Callable[[], None] | None]] = {}
        self.fails_late = False

    def set_parameters(
        self,
        batch_row: int,
        given: RowParameters,
        prompt: Sequence[int] = (),
        output: Sequence[int] = (),
    ) -> None:
        """Set the sampling of a batch row, and count its samples from then on."""
        params = SamplingParams(
            temperature=given.temperature,
            min_p=given.min_p,
            top_k=given.top_k,
            top_p=given.top_p,
            repetition_penalty=given.repetition,
            frequency_penalty=given.frequency,
            presence_penalty=given.presence,
            logit_bias=dict(given.bias),
            bad_words_token_ids=list(given.banned),
            min_tokens=given.min_tokens,
            max_tokens=None,
        )
        output = list(output)

        def give() -> None:
            rules = LogitRules(params, prompt, output, None, given.end_ids)
            self._sampler.set_parameters(
                batch_row, params, given.seed, rules if params.has_rules else None
            )

        give()
        self._counted[batch_row] = output, give if given.is_penalized else None

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Put the tokens in, and how long rows are, then run the step."""
        batch = self.input_batch
        ids, pending = batch.token_ids, batch.pending[: batch.num_tokens]
        for token in np.flatnonzero(pending >= 0):
            place = int(pending[token])
            is_draft = place >= batch.max_num_seqs
            ids[token] = (
                self.drafts[place - batch.max_num_seqs] if is_draft else self._newest[place]
            )
        self._cached, follows = batch.num_computed_tokens.copy(), batch.pending_source >= 0
        self._cached[follows] = self._known[batch.pending_source[follows]]
        self._shifts = batch.num_computed_tokens - self._cached
        assert (self._shifts >= 0).all(), "a plan has fewer tokens than there are"
        return super().execute_model(logits_indices)

    def enqueue_model(self, logits_indices: np.ndarray, sampling: SamplingInputs) -> None:
        """Run the step."""
        self._sampled = logits_indices
        self._unsampled = self.execute_model(logits_indices), sampling

    def sample(self, masks: Sequence[np.ndarray] = ()) -> StepFuture:
        """Sample from the step's logits. The host gets the tokens when it asks for them."""
        (logits, sampling), self._unsampled = self._unsampled, None
        batch_rows, firsts = np.array(sampling.batch_rows), sampling.logits_indptr
        positions = np.array(sampling.positions) - self._shifts[batch_rows]
        masked = [row for row, index in enumerate(sampling.mask_rows) if index >= 0]
        for row, mask in zip(masked, masks, strict=True):
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
            # a mask leaves rows with unusable logits as they are
            if np.isfinite(logits[row]).all():
                logits[row, allowed[: self.vocab_size] == 0] = -np.inf
        drawn = np.empty(len(batch_rows), np.int64)
        for row, (batch_row, position) in enumerate(
            zip(batch_rows.tolist(), positions.tolist(), strict=True)
        ):
            output, give = self._counted[batch_row]
            if give is not None:
                assert len(output) == position, f"batch row {batch_row} has other counts"
                # tokens that were counted may not have stood
                give()
            # bans go by position
            output[:] = output[:position] + [0] * (position - len(output))
            one = slice(row, row + 1)
            drawn[one] = self._sampler.sample(logits[one], batch_rows[one], positions[one])
            output.append(max(int(drawn[row]), 0))
        self._newest, self._known = np.zeros((2, len(firsts) - 1), np.int64)
        self.on_the_way, running, batch = {}, self._running(), self.input_batch
        for place, (first, end) in enumerate(pairwise(firsts)):
            own = batch.token_ids[self._sampled[first:end]][1:]
            wrong = np.flatnonzero(own != drawn[first : end - 1])
            last = first + int(wrong[0]) if len(wrong) else end - 1
            drawn[last + 1 : end] = REJECTED
            batch_row, taken = int(batch_rows[first]), np.maximum(drawn[first : last + 1], 0)
            del self._counted[batch_row][0][int(positions[last]) + 1 :]
            self._newest[place] = taken[-1]
            self._known[place] = (
                self._cached[batch_row] + batch.num_scheduled_tokens[batch_row] + last + 1 - end
            )
            if batch_row in running:
                self.on_the_way[running[batch_row]] = taken.tolist()
        return Tokens(drawn, lambda: self.fails_late)

    def read_drafts(self) -> StepFuture:
        """Return the token buffer with the drafts."""
        before_them = np.zeros(self.input_batch.max_num_seqs, np.int64)
        return Tokens(np.concatenate([before_them, np.array(self.drafts, np.int64)]))


class Tokens:
    """Tokens that the host has not read.

    Args:
        ids: tokens.
        fails: True if the device is gone when they are read.
    """

    def __init__(self, ids: np.ndarray, fails: Callable[[], bool] = lambda: False) -> None:
        self._ids, self._fails = ids, fails

    def result(self) -> np.ndarray:
        """Return the tokens.

        Raises:
            DeviceGone: the step has failed.
        """
        if self._fails():
            raise DeviceGone("the device is gone")
        return self._ids


class AheadDrafter(KnowingDrafter):
    """Leaves its drafts in a DrawingRunner, before the engine has the tokens in front of them.

    Attributes:
        runner: of the engine.
    """

    runner: DrawingRunner

    def num_taken(self, request: Request) -> int:
        """Tokens of the output, those on their way too."""
        on_the_way = self.runner.on_the_way.get(request, ()) if request.pending_row >= 0 else ()
        return super().num_taken(request) + len(on_the_way)

    def propose(self, step: object, counts: Mapping[Request, int]) -> dict[Request, Drafts]:
        self.runner.drafts = []
        proposals = super().propose(step, counts)
        for request, drafts in proposals.items():
            begin = self.runner.input_batch.max_num_seqs + len(self.runner.drafts)
            self.runner.drafts += drafts.tokens
            places = list(range(begin, begin + len(drafts)))
            proposals[request] = Drafts(places, is_pending=True)
        return proposals


def extend_hashes(hashes: list[int], token_ids: Sequence[int], salt: str | None) -> None:
    """Bring `hashes` to one entry a token: of the salt and all tokens up to it."""
    last = hashes[-1] if hashes else zlib.crc32((salt or "").encode("utf-8", "surrogatepass"))
    for token in token_ids[len(hashes) :]:
        # two rounds of 32 bits: a collision in a run would hide only itself
        low = zlib.crc32(token.to_bytes(4, "little"), last & 0xFFFFFFFF)
        last = low | (zlib.crc32(low.to_bytes(4, "little"), last >> 32) & 0x3FFFFFFF) << 32
        hashes.append(last)


def _set_logits(row: np.ndarray, history: int, nan_share: int) -> None:
    """Lift three tokens to about the same weight; NaN for some histories."""
    draw = random.Random(history)
    for token in draw.sample(range(len(row)), NUM_CANDIDATES):
        row[token] = draw.random()
    if nan_share and history % nan_share == 0:
        row[0] = np.nan
