"""Tokens of a step drawn where its logits are: ids come back to the host, logits do not.

The next step may be queued before they have come: it reads them where they were drawn, and how many
drafts stood. So it does drafts, which are drawn from the logits of a layer for multi-token
prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fd_dsa.ops.sampling import DeviceSampler, SlotParameters
from fd_dsa.ops.sampling.verify_kernel import (
    FOLLOW_BLOCK,
    extend_kernel,
    follow_kernel,
    verify_kernel,
)
from fd_dsa.runner.input_batch import Draw
from fd_dsa.step.views import Allocate
from fd_dsa.triton_runtime.transfers import transfers_for, uploaded

__all__ = ["DeviceDraws", "SlotParameters", "draw_bytes"]

# kernels have one form for all views that begin at multiples of 16 bytes
_ALIGNED = 32


class DeviceDraws:
    """Draws of a runner: parameters by slot, and one copy from the device a step.

    What a draw is made by is staged with its step (`host_inputs`). Then come `follow`, `queue`,
    which may be captured both, and `results`.

    Args:
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        most_drafts: of a request in a step; a row of logits is one of a request or of a draft.
        most_tokens: of a step whose every token goes through a layer that drafts; 0 = there is
            none.

    Attributes:
        max_rows: most rows of a draw.
        first_row: what `fill` calls the token of row 0 of the draw.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        allocate: Allocate,
        most_drafts: int = 0,
        most_tokens: int = 0,
    ) -> None:
        self.max_rows = rows = (1 + most_drafts) * max_num_seqs
        self._num_slots, self._most_drafts = max_num_seqs, most_drafts
        self._sampler = DeviceSampler(max_num_seqs, vocab_size, allocate, rows)
        self._stride = stride = -(-max_num_seqs // _ALIGNED) * _ALIGNED
        # with drafts the newest token of each request; the tokens of a draw, by row; then those of
        # each draft, by the rows that they were drawn in
        self.first_row = stride if most_drafts else 0
        self._first_draft = self.first_row + -(-rows // _ALIGNED) * _ALIGNED
        self._tokens = allocate((self._first_draft + most_drafts * stride,), "int64")
        self._sampler.tokens = self._tokens[self.first_row : self._first_draft]
        self._next = allocate((4 * stride,), "int32")
        # of each request: tokens in the cache after the draw
        self._known = self._next[3 * stride :]
        self._no_masks = uploaded(allocate, np.full(rows, -1, np.int32))
        self._transfers = transfers = transfers_for(self._tokens)
        # of the draw that is taken, and of the next one
        self._results = [
            (*self._host_copy(self._sampler.tokens), transfers.event()) for _ in range(2)
        ]
        self._known_tokens = self._host_copy(self._tokens)
        # where requests go on, and the tokens after those of the step
        self._given = transfers.host_buffer(4 * (4 * stride + most_tokens)).view(np.int32)
        # how the rows of a slot are sampled from then on; see DeviceSampler
        self.set_slot = self._sampler.set_slot

    def _host_copy(self, tokens: Any) -> tuple[np.ndarray, Any]:
        """Page-locked memory for some tokens, and the copy to it."""
        ids = self._transfers.host_buffer(8 * len(tokens)).view(np.int64)
        return ids, self._transfers.copy("d2h", ids.ctypes.data, tokens.data_ptr())

    def host_inputs(
        self, draw: Draw, num_rows: int, next_ids: Sequence[int] | np.ndarray = ()
    ) -> tuple[Sequence[int] | np.ndarray, ...]:
        """A draw as `DrawInputs` has it, but for zeros at the ends.

        Args:
            draw: of a step.
            num_rows: rows of the draw, padding included.
            next_ids: of DrawInputs.
        """
        slots = [*draw.slots, *[-1] * (num_rows - len(draw.slots))]
        mask_rows = np.full(num_rows, -1)
        if draw.masked:
            mask_rows[draw.masked] = range(len(draw.masked))
        if not self._most_drafts:
            return slots, draw.positions, mask_rows, (), (), next_ids
        firsts = [*draw.firsts, *[-1] * (self._num_slots - len(draw.firsts))]
        return slots, draw.positions, mask_rows, firsts, draw.counts, next_ids

    def set_masks(self, masks: Sequence[np.ndarray]) -> None:
        """Queue the copy of the masks of the rows that a draw says, in their order."""
        if masks:
            self._sampler.set_masks(np.stack(masks))

    def queue(self, logits: Any, step: Any) -> Any:
        """Queue the draw of a step; its tokens, int64 on the device.

        REJECTED follows a draft that is not the token drawn in its place; without drafts no row
        has that.

        Args:
            logits: float32 [num_padded_rows, vocab_size] on the device, contiguous.
            step: the runner's record of it.
        """
        sampler, most, draw = self._sampler, self._most_drafts, step.draw
        tokens, slots, positions = sampler.tokens, draw.slots, draw.positions
        verified = (step.ids_remove_padding, step.sampled, most) if most else None
        sampler.sample(logits, slots, positions, draw.mask_rows, verified=verified)
        if most:
            # of requests that it has not, too: a step of further drafts may have more rows
            verify_kernel[(self._num_slots,)](
                tokens, step.ids_remove_padding, step.sampled, slots, positions, draw.firsts,
                draw.counts, step.seq_lens_decoder, step.seq_lens_this_time, self._next,
                self._tokens, sampler.records, sampler.counts, STRIDE=self._stride, MOST=most,
                VOCAB=logits.shape[1], num_warps=1,
            )  # fmt: skip
        return tokens

    def draft(self, logits: Any, depth: int, slots: Any, positions: Any) -> None:
        """Queue the draw of a draft for each row, as of any token; `draft_row` says where.

        Args:
            logits: float32 [n, vocab_size], contiguous.
            depth: drafts before these of the same requests.
            slots, positions: int32 [n] on the device; slot -1 = none.
        """
        rows, begin = logits.shape[0], self.draft_row(depth, 0)
        drafts = self._tokens[begin : begin + rows]
        self._sampler.sample(logits, slots, positions, self._no_masks[:rows], drafts)

    def draft_row(self, depth: int, row: int) -> int:
        """What `fill` calls the draft of a row, and `InputBatch.defer_tokens`."""
        return self._first_draft + depth * self._stride + row

    def read_drafts(self) -> Callable[[], np.ndarray]:
        """Queue the copy of all drafts; a wait for the draw before them then waits for it too.

        Returns:
            What waits for them: int64, by `draft_row`, valid until the next call.
        """
        (ids, copy), (*_, copied) = self._known_tokens, self._results[-1]
        copy.queue(ids.nbytes)
        copied.record()

        def taken() -> np.ndarray:
            if not copied.done():
                copied.wait()
            return ids

        return taken

    def going_on(self, count: int) -> list[Any]:
        """Where the first requests of the draw go on, int32 [count] on the device each.

        Returns:
            The flat tokens that their next drafts come after; their slots, -1 without a request;
            the positions of the drafts in their outputs.
        """
        stride = self._stride
        return [self._next[begin : begin + count] for begin in range(0, 3 * stride, stride)]

    def go_on(self, step: Any, next_ids: np.ndarray, *values_of_requests: np.ndarray) -> None:
        """Set `next_ids` of a step and `going_on`, where no draw has; waits for what was queued.

        Args:
            step: the runner's record of it.
            next_ids: int64 [num_tokens].
            values_of_requests: what `going_on` gives, and tokens of each request in the cache.
        """
        end = len(self._next)
        going_on, following = self._given[:end], self._given[end : end + len(next_ids)]
        following[:] = next_ids
        going_on = going_on.reshape(4, self._stride)
        going_on[1] = -1
        for section, values in zip(going_on, values_of_requests, strict=True):
            section[: len(values)] = values
        self._transfers.to_device(self._next, going_on)
        self._transfers.to_device(step.draw.next_ids, following)
        # before they are filled again
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

    def fill(self, token_ids: Any) -> None:
        """Replace ids below 0 by tokens of the draw before.

        Args:
            token_ids: int32 [n] on the device; -1 - i is the newest token of its request i, that of
                a row, see `first_row`, or of a draft, see `draft_row`.
        """
        self._follow(token_ids, *[self._next] * 4, 0, 0)

    def follow(self, step: Any) -> None:
        """Give a step what the draw before has left to it: tokens, and how long its rows are.

        It may be captured: a step that goes on from no draw stays as it is.

        Args:
            step: the runner's record of it, whose metadata is yet to be made.
        """
        cached, draw = step.seq_lens_decoder, step.draw
        sizes = (cached.shape[0], draw.slots.shape[0]) if self._most_drafts else (0, 0)
        ids, rows = step.ids_remove_padding, (cached, step.follows, draw.slots, draw.positions)
        self._follow(ids, *rows, *sizes)

    def extend(self, depth: int, ids: Any, positions: Any, cached: Any, lengths: Any) -> None:
        """Queue what fills a step of one token of each request, its draft before.

        Args:
            depth: drafts before those that the step is for.
            ids, positions: int32 [n]; tokens, and where the new drafts are in their outputs.
            cached, lengths: int32 [B]; of its rows.
        """
        drafts = self._tokens[self.draft_row(depth - 1, 0) :]
        extend_kernel[(1,)](
            self._next, drafts, ids, positions, cached, lengths, ids.shape[0], lengths.shape[0],
            depth, STRIDE=self._stride, BLOCK=FOLLOW_BLOCK, num_warps=4,
        )  # fmt: skip

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
