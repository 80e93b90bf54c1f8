"""Drafts of a layer for multi-token prediction on a device: nothing waits, nothing is read back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fd_dsa.ops._dense_kernels import rows_at
from fd_dsa.runner.device_draws import DeviceDraws
from fd_dsa.step import StepHints
from fd_dsa.step.views import Allocate
from fd_dsa.triton_runtime.transfers import uploaded


class DeviceDrafts:
    """Runs the layer after the draw of a step, over all of its tokens, and draws a draft a request.

    For a further draft it runs again, for one token a request, on what the step and the draft
    before left at fixed addresses.

    Args:
        model: with the layer.
        draws: of the runner, with the tokens of the step and where its requests go on.
        max_rows: of a step.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
    """

    def __init__(self, model: Any, draws: DeviceDraws, max_rows: int, allocate: Allocate) -> None:
        self._mtp, self._draws = model.mtp, draws
        # of steps of further drafts: tokens, positions of the drafts, and lengths as of a Step
        self._ids, self._positions, *self._lengths = (
            uploaded(allocate, np.zeros(max_rows, np.int32)) for _ in range(5)
        )
        # hidden states of the tokens that the first drafts come after; padding reads them too
        nothing = uploaded(allocate, np.full(max_rows, -1, np.int32))
        self._kept = rows_at(model.embed_tokens, nothing)

    def queue(self, hidden: Any, step: Any, num_requests: int) -> None:
        """Queue the layer and the first drafts; may be captured.

        Args:
            hidden: normed hidden states of the model, [num_tokens, hidden_size].
            step: the runner's record of it.
            num_requests: that may go on, at most.
        """
        next_ids = step.draw.next_ids
        self._draws.fill(next_ids)
        states = self._mtp(next_ids, hidden, step)
        if num_requests:
            last, slots, positions = self._draws.going_on(num_requests)
            kept = rows_at(states, last, self._kept[:num_requests])
            self._draws.draft(self._mtp.compute_logits(kept), 0, slots, positions)

    def queue_more(self, step: Any, num_requests: int, longest: int, count: int) -> None:
        """Queue further drafts, each on the layer's own hidden states; may be captured.

        Args:
            step: the runner's record of the step.
            num_requests: of `queue`, or more.
            longest: row with all drafts, at most, tokens. No key is kept of a token for which its
                row has no block.
            count: drafts of each request in all.
        """
        ids, positions = self._ids[:num_requests], self._positions[:num_requests]
        slots, states = self._draws.going_on(num_requests)[1], self._kept[:num_requests]
        new, cached, tokens = (x[: step.block_tables.shape[0]] for x in self._lengths)
        own = replace(
            step,
            hints=StepHints(num_requests, 0, longest),
            ids_remove_padding=ids,
            seq_lens_encoder=new,
            seq_lens_decoder=cached,
            seq_lens_this_time=tokens,
        )
        for depth in range(1, count):
            self._draws.extend(depth, ids, positions, cached, tokens)
            # a record of its own, of which metadata is made once
            one = replace(own)
            one.attn_backend.init_attention_metadata(one)
            states = self._mtp(ids, states, one)
            self._draws.draft(self._mtp.compute_logits(states), depth, slots, positions)
