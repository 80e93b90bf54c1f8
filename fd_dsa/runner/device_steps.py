"""Steps of a runner on a device: inputs, sampling, drafts, and the copies back to the host.

Token ids come back to the host, logits only if the host samples. The next step may be enqueued
before the host has the tokens. On the device it reads them, and how many drafts were accepted. MTP
drafts stay on the device too, without synchronization.

The module needs Triton's launcher, so it is imported only for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from fd_dsa.device.allocation import CACHED_VIEWS, Allocate
from fd_dsa.device.staging import StagedInputs
from fd_dsa.device.transfers import Event, FixedCopy, uploaded
from fd_dsa.ops.dense_kernels import rows_at
from fd_dsa.ops.sampling.sampler import DeviceSampler
from fd_dsa.ops.sampling.token_buffer import TokenBuffer
from fd_dsa.ops.sampling.verify_kernel import (
    FOLLOW_BLOCK,
    extend_kernel,
    follow_kernel,
    verify_kernel,
)
from fd_dsa.runner.input_batch import InputBatch, SamplingInputs, StepInputs
from fd_dsa.runner.model_protocol import MtpLayer
from fd_dsa.runner.step import Step
from fd_dsa.step import StepHints
from fd_dsa.tensor import StepArray, Tensor


class DeviceInputs(StagedInputs):
    """Inputs of a step on a device: sections of one tensor, which one copy fills.

    Args:
        batch: input batch of the runner.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        max_drafts: maximum number of drafts of a row. A token is sampled for each draft, and one
            for the row.
        reads_next: True if a layer for multi-token prediction reads the next tokens.
    """

    def __init__(
        self,
        batch: InputBatch,
        allocate: Allocate,
        max_drafts: int = 0,
        *,
        reads_next: bool = False,
    ) -> None:
        rows, columns = batch.block_tables.shape
        self._max_rows, self._max_samples = rows, (1 + max_drafts) * rows
        self._has_drafts, self._reads_next = max_drafts > 0, reads_next
        samples, max_next = self._max_samples, reads_next * batch.max_num_tokens
        sizes = (batch.max_num_tokens, rows, rows, rows, samples, rows, rows)
        sampling = samples, samples, rows + 1, samples, max_next
        super().__init__(allocate, (*sizes, *sampling), rows, columns)

    def stage(self, inputs: StepInputs, sampling: SamplingInputs, next_ids: StepArray = ()) -> None:
        """Enqueue the copy of the inputs of a step. The arrays may change afterwards.

        Args:
            inputs: result of `InputBatch.arrays`.
            sampling: how a token is sampled from each row of logits.
            next_ids: result of `InputBatch.next_tokens`, if a layer reads them.
        """
        (*values, tables), samples = inputs, self._max_samples
        logits_indptr: StepArray = ()
        if self._has_drafts:
            logits_indptr = _padded(sampling.logits_indptr, self._max_rows + 1)
        batch_rows = _padded(sampling.batch_rows, samples)
        mask_rows = _padded(sampling.mask_rows, samples)
        sampled = batch_rows, sampling.positions, logits_indptr, mask_rows
        self.queue((*values, *sampled, next_ids), tables)

    def views(
        self, num_tokens: int, num_rows: int, num_sampled: int
    ) -> tuple[StepInputs, SamplingInputs]:
        """Return the tensors of a step, which never move."""
        # kernels take no empty tensor
        samples, next_ids = max(num_sampled, 1), self._reads_next * num_tokens
        sizes = (num_tokens, *[num_rows] * 3, num_sampled, num_rows, num_rows)
        sampling = samples, samples, self._max_rows + 1, samples, next_ids
        *values, tables = self.views_of((*sizes, *sampling, num_rows))
        inputs = StepInputs._make((*values[:7], tables))
        return inputs, SamplingInputs(*values[7:])


def _padded(values: Sequence[int], size: int) -> np.ndarray:
    """Return int32 [size] with the values, padded by -1."""
    padded = np.full(size, -1, np.int32)
    padded[: len(values)] = values
    return padded


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


class DeviceSteps:
    """Inputs and samples of the steps of a runner, with one copy to the host a step.

    Parameters of requests are kept by batch row, and the sampling inputs of a step are staged with
    it. The order of calls for a step is `inputs.stage`, `resolve_pending`, `sample`, `samples`, and
    with a layer for multi-token prediction `draft`. All calls but the first and `samples` may be
    captured.

    All steps and their drafts share the memory of the logits. It is free once tokens are sampled.

    Args:
        batch: input batch of the runner.
        vocab_size: number of columns of the logits.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        max_drafts: maximum number of drafts of a request in a step. A row of logits belongs to a
            request or to a draft.
        mtp: layer for multi-token prediction; None without such a layer.

    Attributes:
        inputs: fields of the newest step.
        buffer: layout of the token buffer.
        sampler: sampler with the parameters of each batch row.
    """

    def __init__(
        self,
        batch: InputBatch,
        vocab_size: int,
        allocate: Allocate,
        max_drafts: int = 0,
        mtp: MtpLayer | None = None,
    ) -> None:
        max_num_seqs = batch.max_num_seqs
        self.inputs = DeviceInputs(batch, allocate, max_drafts, reads_next=mtp is not None)
        self.buffer = buffer = TokenBuffer(max_num_seqs, max_drafts)
        rows, self._stride = buffer.num_rows, buffer.stride
        self.sampler = DeviceSampler(max_num_seqs, vocab_size, allocate, rows)
        logits = allocate((rows, vocab_size), "float32")
        self._first_logits = lru_cache(maxsize=CACHED_VIEWS)(partial(_first_rows, logits))
        self._tokens = allocate((buffer.size,), "int64")
        self.sampler.tokens = self._tokens[buffer.sample : buffer.draft(0, 0)]
        # for each request: flat token before its next draft, batch row (-1 = no request), position
        # of the draft in the output, number of tokens in the cache
        self._next = allocate((4 * buffer.stride,), "int32")
        self._known = self._next[3 * buffer.stride :]
        self._no_masks = uploaded(allocate, np.full(rows, -1, np.int32))
        self._transfers = transfers = self.inputs.staging.transfers
        # copies of the samples that the host reads now, and of the next ones
        self._results = [
            (*self._host_copy(self.sampler.tokens), transfers.event()) for _ in range(2)
        ]
        self._known_tokens = self._host_copy(self._tokens)
        self._logits = transfers.host_buffer(4 * max_num_seqs * vocab_size).view(np.float32)
        self._logits_copied = transfers.event()
        self._mtp = mtp
        if mtp is not None:
            # token counts of the steps of further drafts; see Step
            no_tokens = np.zeros(max_num_seqs, np.int32)
            self._counts = [uploaded(allocate, no_tokens) for _ in range(3)]
            # hidden states of the tokens before the first drafts; padding reads them too
            none = uploaded(allocate, np.full(max_num_seqs * mtp.num_streams, -1, np.int32))
            self._kept = rows_at(mtp.embed_tokens, none).reshape([max_num_seqs, -1])

    def _host_copy(self, tokens: Tensor) -> tuple[np.ndarray, FixedCopy]:
        """Page-locked memory for some tokens, and the copy to it."""
        ids = self._transfers.host_buffer(8 * tokens.shape[0]).view(np.int64)
        return ids, self._transfers.copy("d2h", ids.ctypes.data, tokens.data_ptr())

    def logits_memory(self, num_rows: int) -> Tensor | None:
        """Return memory for some rows of logits, float32 [num_rows, vocab_size].

        Returns:
            None for more rows than the device samples. Only the host reads so many.
        """
        return self._first_logits(num_rows) if num_rows <= self.buffer.num_rows else None

    def resolve_pending(self, step: Step) -> None:
        """Resolve the pending tokens of a step and correct the token counts of its rows.

        A step without pending tokens stays as it is.

        Args:
            step: Step whose metadata is not made yet.
        """
        cached, inputs = step.num_computed_tokens, step.sampling
        sizes = (cached.shape[0], inputs.batch_rows.shape[0]) if self.buffer.max_drafts else (0, 0)
        rows = cached, step.pending_source, inputs.batch_rows, inputs.positions
        self._follow(step.token_ids, *rows, *sizes)

    def sample(self, step: Step) -> None:
        """Enqueue the sampling of a step.

        The result of a row after a rejected draft is REJECTED.

        Args:
            step: Step with logits, float32 [num_padded_rows, vocab_size], contiguous.
        """
        sampler, max_drafts, inputs = self.sampler, self.buffer.max_drafts, step.sampling
        logits, batch_rows, positions = step.logits, inputs.batch_rows, inputs.positions
        assert logits is not None, "the model has not run"
        verified = (step.token_ids, step.sampled, max_drafts) if max_drafts else None
        sampler.sample(logits, batch_rows, positions, inputs.mask_rows, verified=verified)
        if max_drafts:
            # the launch covers all requests, because a step of further drafts may have more rows
            verify_kernel[(self.buffer.max_num_seqs,)](
                sampler.tokens, step.token_ids, step.sampled, batch_rows, positions,
                inputs.logits_indptr, step.num_computed_tokens, step.num_scheduled_tokens,
                self._next, self._tokens, sampler.records, sampler.counts, STRIDE=self._stride,
                MAX_DRAFTS=max_drafts, VOCAB=logits.shape[1], num_warps=1,
            )  # fmt: skip

    def samples(self, count: int) -> HostTokens:
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

    def logits_on_host(self, logits: StepArray) -> np.ndarray:
        """Copy logits to page-locked memory, and wait for the copy.

        Args:
            logits: float32 tensor. More values than a row of logits for each batch row grow the
                memory.

        Returns:
            float32 of the tensor's shape, valid until the next call.
        """
        size = int(np.prod(logits.shape))
        if size > len(self._logits):
            self._logits = self._transfers.host_buffer(4 * size).view(np.float32)
        values = self._logits[:size]
        self._transfers.to_host(values, logits)
        self._logits_copied.record()
        self._logits_copied.wait()
        return values.reshape(logits.shape)

    def draft(self, step: Step, num_requests: int) -> None:
        """Enqueue the layer over all tokens of a step, then one draft of each request.

        Args:
            step: Step with hidden states.
            num_requests: maximum number of requests that continue.
        """
        next_ids = step.sampling.next_ids
        self._follow(next_ids, *[self._next] * 4, 0, 0)
        states = self._layer()(next_ids, step.hidden_states, step)
        if num_requests:
            last, kept = self._next[:num_requests], self._kept[:num_requests]
            self._sample_drafts(rows_at(states, last, kept), 0)

    def draft_more(self, step: Step, num_requests: int, longest: int, count: int) -> None:
        """Enqueue further drafts, each on the layer's own hidden states.

        The layer runs for one token a request, on the hidden states of the draft before.

        Args:
            step: Step of the first drafts.
            num_requests: at least that of `draft`.
            longest: bound of the length of a row with all drafts, tokens. A token has no key if its
                row has no block for it.
            count: number of drafts of each request, with the first one.
        """
        layer, states = self._layer(), self._kept[:num_requests]
        chunks, cached, tokens = (x[: step.block_tables.shape[0]] for x in self._counts)
        for depth in range(1, count):
            begin = self.buffer.draft(depth - 1, 0)
            ids = self._tokens[begin : begin + num_requests]
            extend_kernel[(1,)](
                self._next, cached, tokens, num_requests, tokens.shape[0], depth,
                STRIDE=self._stride, BLOCK=FOLLOW_BLOCK, num_warps=4,
            )  # fmt: skip
            own = replace(
                step,
                token_ids=ids,
                num_chunk_tokens=chunks,
                num_computed_tokens=cached,
                num_scheduled_tokens=tokens,
            )
            counts = chunks, cached, tokens
            hints = StepHints(num_requests, 0, longest)
            step.attn_backend.build_step(own, (*counts, step.block_tables), hints)
            states = layer(ids, states, own)
            self._sample_drafts(states, depth)

    def _layer(self) -> MtpLayer:
        """Return the layer that drafts."""
        assert self._mtp is not None, "the model has no layer that drafts"
        return self._mtp

    def _sample_drafts(self, states: Tensor, depth: int) -> None:
        """Enqueue the sampling of one draft of each request, after `depth` other drafts."""
        rows, stride, begin = states.shape[0], self._stride, self.buffer.draft(depth, 0)
        batch_rows, positions = (self._next[i * stride : i * stride + rows] for i in (1, 2))
        logits = self._layer().compute_logits(states, self.logits_memory(rows))
        drafts = self._tokens[begin : begin + rows]
        self.sampler.sample(logits, batch_rows, positions, self._no_masks[:rows], drafts)

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
        """Set the inputs of `draft` after a step that the host has sampled.

        The call waits for all work that is enqueued.

        Args:
            step: Step that was sampled.
            next_ids: int64 [num_tokens]; the token after each token of the step.
            places: for each request the flat token before its draft, its batch row, the position of
                the draft, and the number of tokens in the cache.
        """
        continued = np.full((4, self._stride), -1, np.int32)
        continued[:, : len(places)] = np.array(places, np.int32).reshape(-1, 4).T
        self._transfers.to_device(self._next, continued)
        next_values = next_ids.astype(np.int32)
        self._transfers.to_device(step.sampling.next_ids, next_values)
        # keep the arrays alive until the copies have finished
        self.finish()

    def finish(self) -> None:
        """Wait for all work of the current stream, without Python's lock."""
        self._transfers.finish()

    def warm_up(self) -> None:
        """Enqueue the sampling of the maximum number of rows, all padding.

        Later steps compile no kernel.
        """
        self.sampler.warm_up(self._no_masks)

    def _follow(self, ids: Tensor, *others: Tensor | int) -> None:
        """Enqueue the kernel that resolves pending tokens among `ids`."""
        count = ids.shape[0]
        follow_kernel[(-(-count // FOLLOW_BLOCK),)](
            ids, self._tokens, self._known, count, *others, BLOCK=FOLLOW_BLOCK, num_warps=4,
        )  # fmt: skip


def _first_rows(table: Tensor, count: int) -> Tensor:
    """Return the first rows of a table."""
    return table[:count]


def sampling_bytes(max_num_seqs: int, vocab_size: int, max_drafts: int = 0) -> int:
    """Return the maximum number of bytes that logits and sampling take on the device."""
    rows = (1 + max_drafts) * max_num_seqs
    return max_num_seqs * 5 * vocab_size + rows * (13 * vocab_size + (80 << 10))
