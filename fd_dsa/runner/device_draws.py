"""Sampling on the device: token ids come back to the host, logits do not.

The next step may be enqueued before the host has the tokens. On the device it reads them, and how
many drafts were accepted. MTP drafts stay on the device too, without synchronization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import Event, FixedCopy, transfers_for, uploaded
from fd_dsa.ops.dense_kernels import rows_at
from fd_dsa.ops.sampling.sampler import DeviceSampler
from fd_dsa.ops.sampling.token_buffer import TokenBuffer
from fd_dsa.ops.sampling.verify_kernel import (
    FOLLOW_BLOCK,
    extend_kernel,
    follow_kernel,
    verify_kernel,
)
from fd_dsa.runner.model_protocol import MtpLayer
from fd_dsa.runner.step import Step
from fd_dsa.step import StepHints
from fd_dsa.tensor import Tensor


class HostTokens:
    """StepFuture of tokens whose copy to the host is enqueued.

    Args:
        ids: int64 [n] in page-locked memory, the target of the copy.
        copied: event after the copy.
        may_be_waited_for: True if an earlier wait may have covered the copy.
    """

    def __init__(self, ids: np.ndarray, copied: Event, may_be_waited_for: bool = False) -> None:
        self._ids, self._copied, self._may_be_done = ids, copied, may_be_waited_for

    def result(self) -> np.ndarray:
        """Wait for the tokens, as `StepFuture.result` does."""
        if not (self._may_be_done and self._copied.done()):
            self._copied.wait()
        return self._ids


class DeviceDraws:
    """Samples the steps of a runner, with one copy to the host a step.

    Parameters of requests are kept by batch row, and the sampling inputs of a step are staged with
    it. A step calls `follow` and `queue`, which both may be captured, and then `results`. With a
    layer for multi-token prediction `queue_drafts` comes after that.

    Args:
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        most_drafts: maximum number of drafts of a request in a step. A row of logits belongs to a
            request or to a draft.
        mtp: layer for multi-token prediction; None without such a layer.

    Attributes:
        buffer: layout of the token buffer.
        sampler: sampler with the parameters of each batch row.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        allocate: Allocate,
        most_drafts: int = 0,
        mtp: MtpLayer | None = None,
    ) -> None:
        self.buffer = buffer = TokenBuffer(max_num_seqs, most_drafts)
        rows, self._stride = buffer.num_rows, buffer.stride
        self.sampler = DeviceSampler(max_num_seqs, vocab_size, allocate, rows)
        self._tokens = allocate((buffer.size,), "int64")
        self.sampler.tokens = self._tokens[buffer.sample : buffer.draft(0, 0)]
        # for each request: flat token before its next draft, batch row (-1 = no request), position
        # of the draft in the output, number of tokens in the cache
        self._next = allocate((4 * buffer.stride,), "int32")
        self._known = self._next[3 * buffer.stride :]
        self._no_masks = uploaded(allocate, np.full(rows, -1, np.int32))
        self._transfers = transfers = transfers_for(self._tokens)
        # of the samples that the host reads, and of the next ones
        self._results = [
            (*self._host_copy(self.sampler.tokens), transfers.event()) for _ in range(2)
        ]
        self._known_tokens = self._host_copy(self._tokens)
        self._mtp = mtp
        if mtp is not None:
            # lengths of the steps of further drafts; see Step
            no_tokens = np.zeros(max_num_seqs, np.int32)
            self._lengths = [uploaded(allocate, no_tokens) for _ in range(3)]
            # hidden states of the tokens before the first drafts; padding reads them too
            self._kept = rows_at(mtp.embed_tokens, self._no_masks[:max_num_seqs])

    def _host_copy(self, tokens: Tensor) -> tuple[np.ndarray, FixedCopy]:
        """Page-locked memory for some tokens, and the copy to it."""
        ids = self._transfers.host_buffer(8 * tokens.shape[0]).view(np.int64)
        return ids, self._transfers.copy("d2h", ids.ctypes.data, tokens.data_ptr())

    def queue(self, step: Step) -> None:
        """Enqueue the sampling of a step.

        The result of a row after a rejected draft is REJECTED.

        Args:
            step: Step with logits, float32 [num_padded_rows, vocab_size], contiguous.
        """
        sampler, most, inputs = self.sampler, self.buffer.max_drafts, step.sampling
        logits, slots, positions = step.logits, inputs.slots, inputs.positions
        assert logits is not None, "the model has not run"
        verified = (step.ids_remove_padding, step.sampled, most) if most else None
        sampler.sample(logits, slots, positions, inputs.mask_rows, verified=verified)
        if most:
            # the launch covers all requests, because a step of further drafts may have more rows
            verify_kernel[(self.buffer.max_num_seqs,)](
                sampler.tokens, step.ids_remove_padding, step.sampled, slots, positions,
                inputs.logits_indptr, step.seq_lens_decoder, step.seq_lens_this_time, self._next,
                self._tokens, sampler.records, sampler.counts, STRIDE=self._stride, MAX_DRAFTS=most,
                VOCAB=logits.shape[1], num_warps=1,
            )  # fmt: skip

    def queue_drafts(self, step: Step, num_requests: int) -> None:
        """Enqueue the layer over all tokens of a step, then one draft of each request.

        Args:
            step: Step with hidden states.
            num_requests: maximum number of requests that go on.
        """
        next_ids = step.sampling.next_ids
        self._follow(next_ids, *[self._next] * 4, 0, 0)
        states = self._layer()(next_ids, step.hidden_states, step)
        if num_requests:
            last, kept = self._next[:num_requests], self._kept[:num_requests]
            self._draw_drafts(rows_at(states, last, kept), 0)

    def queue_more_drafts(self, step: Step, num_requests: int, longest: int, count: int) -> None:
        """Enqueue further drafts, each on the layer's own hidden states.

        The work may be captured. The layer runs for one token a request, on the hidden states of
        the draft before.

        Args:
            step: Step of the first drafts.
            num_requests: at least that of `queue_drafts`.
            longest: bound of the length of a row with all drafts, tokens. A token has no key if its
                row has no block for it.
            count: number of drafts of each request, with the first one.
        """
        layer, states = self._layer(), self._kept[:num_requests]
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
            own.build_metadata()
            states = layer(ids, states, own)
            self._draw_drafts(states, depth)

    def _layer(self) -> MtpLayer:
        """Return the layer that drafts."""
        assert self._mtp is not None, "the model has no layer that drafts"
        return self._mtp

    def _draw_drafts(self, states: Tensor, depth: int) -> None:
        """Enqueue the sampling of one draft of each request, after `depth` other drafts."""
        rows, stride, begin = states.shape[0], self._stride, self.buffer.draft(depth, 0)
        slots, positions = (self._next[i * stride : i * stride + rows] for i in (1, 2))
        logits, drafts = self._layer().head.times(states), self._tokens[begin : begin + rows]
        self.sampler.sample(logits, slots, positions, self._no_masks[:rows], drafts)

    def read_drafts(self) -> HostTokens:
        """Enqueue the copy of the token buffer, which a wait for the newest samples covers too.

        Returns:
            Handle of the buffer, int64 [buffer.size], valid until the next call.
        """
        (ids, copy), (*_, copied) = self._known_tokens, self._results[-1]
        copy.queue(ids.nbytes)
        copied.record()
        return HostTokens(ids, copied, may_be_waited_for=True)

    def seed_drafts(
        self, step: Step, next_ids: np.ndarray, places: Sequence[Sequence[int]]
    ) -> None:
        """Set the inputs of `queue_drafts` after a step that the host has sampled.

        The call waits for all work that is enqueued.

        Args:
            step: Step that was sampled.
            next_ids: int64 [num_tokens]; the token after each token of the step.
            places: for each request the flat token before its draft, its batch row, the position of
                the draft, and the number of tokens in the cache.
        """
        going_on = np.full((4, self._stride), -1, np.int32)
        going_on[:, : len(places)] = np.array(places, np.int32).reshape(-1, 4).T
        self._transfers.to_device(self._next, going_on)
        following = next_ids.astype(np.int32)
        self._transfers.to_device(step.sampling.next_ids, following)
        # keep the arrays alive until the copies have finished
        self._transfers.finish()

    def results(self, count: int) -> HostTokens:
        """Enqueue the copy of the samples of a step.

        Returns:
            Handle of int64 [count]; values of `Sampler.sample` or REJECTED. They are valid until
            the second step after this one is sampled.
        """
        ids, copy, copied = self._results[0]
        self._results.reverse()
        copy.queue(8 * count)
        copied.record()
        # its wait is the only one of a step
        return HostTokens(ids[:count], copied)

    def follow(self, step: Step) -> None:
        """Resolve the pending tokens of a step and correct the lengths of its rows.

        The work may be captured. A step without pending tokens stays as it is.

        Args:
            step: Step whose metadata is not made yet.
        """
        cached, inputs = step.seq_lens_decoder, step.sampling
        sizes = (cached.shape[0], inputs.slots.shape[0]) if self.buffer.max_drafts else (0, 0)
        rows = cached, step.follows, inputs.slots, inputs.positions
        self._follow(step.ids_remove_padding, *rows, *sizes)

    def warm_up(self) -> None:
        """Enqueue the sampling of the maximum number of rows, all padding.

        Later steps compile no kernel.
        """
        self.sampler.warm_up(self._no_masks)

    def _follow(self, ids: Tensor, *others: Tensor | int) -> None:
        count = ids.shape[0]
        follow_kernel[(-(-count // FOLLOW_BLOCK),)](
            ids, self._tokens, self._known, count, *others, BLOCK=FOLLOW_BLOCK, num_warps=4,
        )  # fmt: skip


def draw_bytes(max_num_seqs: int, vocab_size: int, most_drafts: int = 0) -> int:
    """Return the maximum number of bytes of DeviceDraws on the device."""
    rows = (1 + most_drafts) * max_num_seqs
    return max_num_seqs * 5 * vocab_size + rows * (9 * vocab_size + (80 << 10))
