"""Tokens of a step drawn where its logits are: ids come back to the host, logits do not.

The next step may be queued before they have come: it reads them where they were drawn, and how many
drafts stood. So it does drafts, which are drawn from the logits of a layer for multi-token
prediction: nothing waits for them, nothing is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import transfers_for, uploaded
from fd_dsa.ops.dense_kernels import rows_at
from fd_dsa.ops.sampling.sampler import DeviceSampler
from fd_dsa.ops.sampling.token_buffer import TokenBuffer
from fd_dsa.ops.sampling.verify_kernel import (
    FOLLOW_BLOCK,
    extend_kernel,
    follow_kernel,
    verify_kernel,
)
from fd_dsa.step import StepHints


class DeviceDraws:
    """Draws of a runner: parameters by slot, and one copy from the device a step.

    What a draw is made by is staged with its step. Then come `follow`, `queue`, which may be
    captured both, and `results`; with a layer for multi-token prediction `queue_drafts` after that.

    Args:
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        most_drafts: of a request in a step; a row of logits is one of a request or of a draft.
        model: whose layer drafts, if it has one.

    Attributes:
        buffer: layout of the token buffer.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        allocate: Allocate,
        most_drafts: int = 0,
        model: Any = None,
    ) -> None:
        self.buffer = buffer = TokenBuffer(max_num_seqs, most_drafts)
        rows, self._stride = buffer.num_rows, buffer.stride
        self._sampler = DeviceSampler(max_num_seqs, vocab_size, allocate, rows)
        self._tokens = allocate((buffer.size,), "int64")
        self._sampler.tokens = self._tokens[buffer.sample : buffer.draft(0, 0)]
        # where requests go on: the flat tokens that their next drafts come after; their slots, -1
        # without a request; positions of the drafts in their outputs; tokens in the cache
        self._next = allocate((4 * buffer.stride,), "int32")
        self._known = self._next[3 * buffer.stride :]
        self._no_masks = uploaded(allocate, np.full(rows, -1, np.int32))
        self._transfers = transfers = transfers_for(self._tokens)
        # of the draw that is taken, and of the next one
        self._results = [
            (*self._host_copy(self._sampler.tokens), transfers.event()) for _ in range(2)
        ]
        self._known_tokens = self._host_copy(self._tokens)
        # how the rows of a slot are sampled from then on, and what may come; see DeviceSampler
        self.set_slot, self.set_masks = self._sampler.set_slot, self._sampler.set_masks
        self._mtp = getattr(model, "mtp", None)
        if self._mtp is not None:
            # of steps of further drafts, as of a Step
            no_tokens = np.zeros(max_num_seqs, np.int32)
            self._lengths = [uploaded(allocate, no_tokens) for _ in range(3)]
            # hidden states of the tokens that the first drafts come after; padding reads them too
            self._kept = rows_at(model.embed_tokens, self._no_masks[:max_num_seqs])

    def _host_copy(self, tokens: Any) -> tuple[np.ndarray, Any]:
        """Page-locked memory for some tokens, and the copy to it."""
        ids = self._transfers.host_buffer(8 * len(tokens)).view(np.int64)
        return ids, self._transfers.copy("d2h", ids.ctypes.data, tokens.data_ptr())

    def queue(self, logits: Any, step: Any) -> None:
        """Queue the draw of a step.

        REJECTED follows a draft that is not the token drawn in its place; without drafts no row
        has that.

        Args:
            logits: float32 [num_padded_rows, vocab_size] on the device, contiguous.
            step: the runner's record of it.
        """
        sampler, most, draw = self._sampler, self.buffer.max_drafts, step.draw
        slots, positions = draw.slots, draw.positions
        verified = (step.ids_remove_padding, step.sampled, most) if most else None
        sampler.sample(logits, slots, positions, draw.mask_rows, verified=verified)
        if most:
            # of requests that it has not, too: a step of further drafts may have more rows
            verify_kernel[(self.buffer.max_num_seqs,)](
                sampler.tokens, step.ids_remove_padding, step.sampled, slots, positions,
                draw.firsts, step.seq_lens_decoder, step.seq_lens_this_time, self._next,
                self._tokens, sampler.records, sampler.counts, STRIDE=self._stride, MOST=most,
                VOCAB=logits.shape[1], num_warps=1,
            )  # fmt: skip

    def queue_drafts(self, hidden: Any, step: Any, num_requests: int) -> None:
        """Queue the layer over all tokens of a step, then a draft of each request; see `queue`.

        Args:
            hidden: normed hidden states of the model, [num_tokens, hidden_size].
            step: the runner's record of it.
            num_requests: that may go on, at most.
        """
        next_ids = step.draw.next_ids
        self._follow(next_ids, *[self._next] * 4, 0, 0)
        states = self._mtp(next_ids, hidden, step)
        if num_requests:
            last, kept = self._next[:num_requests], self._kept[:num_requests]
            self._draw_drafts(rows_at(states, last, kept), 0)

    def queue_more_drafts(self, step: Any, num_requests: int, longest: int, count: int) -> None:
        """Queue further drafts, each on the layer's own hidden states; may be captured.

        The layer runs for one token a request, on what the step and the draft before left.

        Args:
            step: the runner's record of the step.
            num_requests: of `queue_drafts`, or more.
            longest: row with all drafts, at most, tokens. No key is kept of a token for which its
                row has no block.
            count: drafts of each request in all.
        """
        states = self._kept[:num_requests]
        new, cached, tokens = (x[: step.block_tables.shape[0]] for x in self._lengths)
        for depth in range(1, count):
            begin = self.buffer.draft(depth - 1, 0)
            ids = self._tokens[begin : begin + num_requests]
            extend_kernel[(1,)](
                self._next, cached, tokens, num_requests, tokens.shape[0], depth,
                STRIDE=self._stride, BLOCK=FOLLOW_BLOCK, num_warps=4,
            )  # fmt: skip
            own = replace(
                step,
                hints=StepHints(num_requests, 0, longest),
                ids_remove_padding=ids,
                seq_lens_encoder=new,
                seq_lens_decoder=cached,
                seq_lens_this_time=tokens,
            )
            own.attn_backend.init_attention_metadata(own)
            states = self._mtp(ids, states, own)
            self._draw_drafts(states, depth)

    def _draw_drafts(self, states: Any, depth: int) -> None:
        """Queue the draw of a draft of each request, as of any token, with `depth` before it."""
        rows, stride, begin = states.shape[0], self._stride, self.buffer.draft(depth, 0)
        slots, positions = (self._next[i * stride : i * stride + rows] for i in (1, 2))
        logits, drafts = self._mtp.head.times(states), self._tokens[begin : begin + rows]
        self._sampler.sample(logits, slots, positions, self._no_masks[:rows], drafts)

    def read_drafts(self) -> Callable[[], np.ndarray]:
        """Queue the copy of all drafts; a wait for the draw before them then waits for it too.

        Returns:
            A function that waits for them and returns the token buffer, int64 [buffer.size], valid
            until the next call.
        """
        (ids, copy), (*_, copied) = self._known_tokens, self._results[-1]
        copy.queue(ids.nbytes)
        copied.record()

        def taken() -> np.ndarray:
            if not copied.done():
                copied.wait()
            return ids

        return taken

    def go_on(self, step: Any, next_ids: np.ndarray, places: Sequence[Sequence[int]]) -> None:
        """Set what `queue_drafts` goes on from, where no draw has; waits for what was queued.

        Args:
            step: the runner's record of it.
            next_ids: int64 [num_tokens]; the token after each one of the step.
            places: of each request the flat token that its draft comes after, the slot, the
                position of the draft, and tokens in the cache.
        """
        going_on = np.full((4, self._stride), -1, np.int32)
        going_on[:, : len(places)] = np.array(places, np.int32).reshape(-1, 4).T
        self._transfers.to_device(self._next, going_on)
        following = next_ids.astype(np.int32)
        self._transfers.to_device(step.draw.next_ids, following)
        # before these arrays go
        self._transfers.finish()

    def results(self, count: int) -> Callable[[], np.ndarray]:
        """Queue the copy of the first tokens of the draw.

        Returns:
            What waits for them: int64 [count], as of `Sampler.sample` or REJECTED, valid until two
            draws later.
        """
        ids, copy, copied = self._results[0]
        self._results.reverse()
        copy.queue(8 * count)
        copied.record()

        def taken() -> np.ndarray:
            # the step's one wait
            copied.wait()
            return ids[:count]

        return taken

    def follow(self, step: Any) -> None:
        """Resolve the pending tokens of a step and correct the lengths of its rows.

        The work may be captured. A step without pending tokens stays as it is.

        Args:
            step: the runner's record of the step, before its metadata is made.
        """
        cached, draw = step.seq_lens_decoder, step.draw
        sizes = (cached.shape[0], draw.slots.shape[0]) if self.buffer.max_drafts else (0, 0)
        rows = cached, step.follows, draw.slots, draw.positions
        self._follow(step.ids_remove_padding, *rows, *sizes)

    def warm_up(self) -> None:
        """Queue a draw of as many rows as there may be, all padding: no later one compiles."""
        self._sampler.warm_up(self._no_masks)

    def _follow(self, ids: Any, *others: Any) -> None:
        count = ids.shape[0]
        follow_kernel[(-(-count // FOLLOW_BLOCK),)](
            ids, self._tokens, self._known, count, *others, BLOCK=FOLLOW_BLOCK, num_warps=4,
        )  # fmt: skip


def draw_bytes(max_num_seqs: int, vocab_size: int, most_drafts: int = 0) -> int:
    """Bytes that DeviceDraws takes on the device at most."""
    rows = (1 + most_drafts) * max_num_seqs
    return max_num_seqs * 5 * vocab_size + rows * (9 * vocab_size + (80 << 10))
