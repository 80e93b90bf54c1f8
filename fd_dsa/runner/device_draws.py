"""Tokens of a step drawn where its logits are: ids come back to the host, logits do not.

The next step may be queued before they have come: it reads them where they were drawn, and how many
drafts stood. So it does drafts, which are drawn from the logits of a layer for multi-token
prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fd_dsa.ops.sampling import DeviceSampler, SlotParameters
from fd_dsa.ops.sampling.draw_kernels import FILL_BLOCK, fill_drawn_kernel
from fd_dsa.ops.sampling.verify_kernel import (
    ROW_BLOCK,
    catch_up_kernel,
    shift_positions_kernel,
    verify_kernel,
)
from fd_dsa.step.staging import StagedInputs
from fd_dsa.step.views import Allocate
from fd_dsa.triton_runtime.transfers import uploaded

__all__ = ["DeviceDraws", "SlotParameters", "draw_bytes"]

_NOTHING = np.empty(0, np.int64)
# kernels have one form for all views that begin at multiples of 16 bytes
_ALIGNED = 32


class DeviceDraws:
    """Draws of a runner: parameters by slot, one copy to the device a step and one back.

    A draw is `place`, `queue`, which may be captured, and `results`.

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
        self._has_layer = most_tokens > 0
        self._sampler = DeviceSampler(max_num_seqs, vocab_size, allocate, rows)
        self._stride = stride = -(-max_num_seqs // _ALIGNED) * _ALIGNED
        # with drafts the newest token of each request; the tokens of a draw, by row; then those of
        # each draft, by the rows that they were drawn in
        self.first_row = stride if most_drafts else 0
        self._first_draft = self.first_row + -(-rows // _ALIGNED) * _ALIGNED
        self._tokens = allocate((self._first_draft + most_drafts * stride,), "int64")
        self._sampler.tokens = self._tokens[self.first_row : self._first_draft]
        self._next, self._shifts = allocate((4 * stride,), "int32"), allocate((stride,), "int32")
        # of each request: tokens in the cache after the draw
        self._known = self._next[3 * stride :]
        # whether rows of the newest step go on from a draw
        self._is_shifted = False
        self._no_masks = uploaded(allocate, np.full(stride, -1, np.int32))
        # slot and position of each row, the first row and the drafts of each request, the tokens
        # that follow those of the step; and as a table the row of each row's mask
        of_drafts = (max_num_seqs, max_num_seqs, most_tokens) if most_drafts else ()
        self._inputs = StagedInputs(allocate, (rows, rows, *of_drafts), rows, 1)
        self._views: list[Any] = []
        self._transfers = transfers = self._inputs.staging.transfers
        # of the draw that is taken, and of the next one
        self._results = [
            (transfers.host_buffer(8 * rows).view(np.int64), transfers.event()) for _ in range(2)
        ]
        going_on = transfers.host_buffer(16 * stride).view(np.int32)
        self._going_on = going_on.reshape(4, stride)
        # how the rows of a slot are sampled from then on; see DeviceSampler
        self.set_slot = self._sampler.set_slot

    def place(
        self,
        slots: np.ndarray,
        positions: np.ndarray,
        masks: Mapping[int, np.ndarray],
        num_padded_rows: int,
        firsts: np.ndarray = _NOTHING,
        next_ids: np.ndarray = _NOTHING,
    ) -> None:
        """Queue the copies of what the next draw is made by, to places that never move.

        Args:
            slots, positions: int64 [n]; slot of each row, and position of the token in its output,
                planned as the lengths of the step.
            masks: of the rows that have one, see `DeviceSampler.set_masks`.
            num_padded_rows: rows of the draw; those from n on get no token.
            firsts: int64; rows of requests whose next rows, up to the next one, are of drafts.
            next_ids: int64; the token after each one of the step, or what `fill` replaces.
        """
        mask_rows = np.full((num_padded_rows, 1), -1)
        if masks:
            mask_rows[list(masks), 0] = range(len(masks))
            self._sampler.set_masks(np.stack(list(masks.values())))
        rows = _padded(slots, num_padded_rows, -1), _padded(positions, num_padded_rows, 0)
        if not self._most_drafts:
            self._views = self._inputs.upload(rows, mask_rows)
            return
        counts = np.diff(firsts, append=len(slots)) - 1
        requests = _padded(firsts, self._num_slots, -1), _padded(counts, self._num_slots, 0)
        if self._has_layer:
            next_ids = _padded(next_ids, max(num_padded_rows, len(next_ids)), 0)
        self._views = self._inputs.upload((*rows, *requests, next_ids), mask_rows)
        if self._is_shifted and len(slots):
            shift_positions_kernel[(-(-num_padded_rows // ROW_BLOCK),)](
                self._views[1], self._views[0], self._shifts, num_padded_rows,
                BLOCK=ROW_BLOCK, num_warps=1,
            )  # fmt: skip

    def queue(self, logits: Any, step: Any) -> Any:
        """Queue the draw that was placed; its tokens, int64 on the device.

        REJECTED follows a draft that is not the token drawn in its place; without drafts no row
        has that.

        Args:
            logits: float32 [num_padded_rows, vocab_size] on the device, contiguous.
            step: the runner's record of it.
        """
        sampler, (slots, positions, *requests) = self._sampler, self._views
        tokens, most = sampler.tokens, self._most_drafts
        verified = (step.ids_remove_padding, step.sampled, most) if most else None
        sampler.sample(logits, slots, positions, requests[-1], verified=verified)
        if most:
            firsts, counts = requests[:2]
            verify_kernel[(min(self._num_slots, logits.shape[0]),)](
                tokens, step.ids_remove_padding, step.sampled, slots, positions, firsts, counts,
                step.seq_lens_decoder, step.seq_lens_this_time, self._next, self._tokens,
                sampler.records, sampler.counts, STRIDE=self._stride, MOST=most,
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

    @property
    def placed(self) -> list[Any]:
        """On the device: slots and positions of the rows, and last the tokens that follow."""
        return self._views[:-1]

    def going_on(self, count: int) -> list[Any]:
        """Where the first requests of the draw go on, int32 [count] on the device each.

        Returns:
            The flat tokens that their next drafts come after; their slots, -1 without a request;
            the positions of the drafts in their outputs.
        """
        stride = self._stride
        return [self._next[begin : begin + count] for begin in range(0, 3 * stride, stride)]

    def go_on(self, *values_of_requests: np.ndarray) -> None:
        """Set `going_on`, where no draw has; waits for what was queued before.

        Args:
            values_of_requests: those three, and tokens of each request in the cache.
        """
        self._going_on[1] = -1
        for section, values in zip(self._going_on, values_of_requests, strict=True):
            section[: len(values)] = values
        self._transfers.to_device(self._next, self._going_on)
        # before it is filled again
        self._transfers.finish()

    def results(self, count: int) -> Callable[[], np.ndarray]:
        """Queue the copy of the first tokens of the draw.

        Returns:
            What waits for them: int64 [count], as of `Sampler.sample` or REJECTED, valid until two
            draws later.
        """
        ids, copied = self._results[0]
        self._results.reverse()
        self._transfers.to_host(ids[:count], self._sampler.tokens)
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
        count = token_ids.shape[0]
        fill_drawn_kernel[(-(-count // FILL_BLOCK),)](
            token_ids, self._tokens, count, BLOCK=FILL_BLOCK, num_warps=4
        )

    def follow(self, step: Any, is_deferred: bool, ahead: int = 0) -> None:
        """Give a step what the draw before has left to it: tokens, and how long its rows are.

        Args:
            step: the runner's record of it, whose metadata is yet to be made.
            is_deferred: whether it has tokens of a draw.
            ahead: tokens in the cache of rows that go on, beside those that stand.
        """
        self._is_shifted = is_deferred and self._most_drafts > 0
        if is_deferred:
            self.fill(step.ids_remove_padding)
        if self._is_shifted:
            rows = step.follows.shape[0]
            catch_up_kernel[(-(-rows // ROW_BLOCK),)](
                step.seq_lens_decoder, step.follows, self._known, self._shifts, rows, ahead,
                BLOCK=ROW_BLOCK, num_warps=1,
            )  # fmt: skip


def _padded(values: np.ndarray, size: int, filler: int) -> np.ndarray:
    """The values, and a filler up to a size; np.pad takes ten times as long."""
    padded = np.full(size, filler)
    padded[: len(values)] = values
    return padded


def draw_bytes(max_num_seqs: int, vocab_size: int, most_drafts: int = 0) -> int:
    """Bytes that DeviceDraws takes on the device at most."""
    rows = (1 + most_drafts) * max_num_seqs
    return max_num_seqs * 5 * vocab_size + rows * (7 * vocab_size + (80 << 10))
