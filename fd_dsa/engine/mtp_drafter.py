"""Drafts of the checkpoint's own layer for multi-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.draft_state import Drafts
from fd_dsa.engine.launched_step import LaunchedStep
from fd_dsa.engine.request import Request
from fd_dsa.engine.speculation import Drafter
from fd_dsa.engine.step_sampler import StepSampler

Int64 = npt.NDArray[np.int64]


class MtpDrafter(Drafter):
    """Drafter of the method "mtp": the layer runs after each step, for all of its tokens.

    For token i it needs the hidden state of i and token i + 1. It also runs where nobody wants a
    draft: its caches would have holes that cannot be filled later. A further draft runs it again,
    for one token a row, on its own hidden state; the next step overwrites what that leaves in the
    caches. It draws as the request will: with its parameters, and its own number of the position.

    Args:
        runner: has `predict_more`.
    """

    is_layer, usual_rate = True, 0.85

    def __init__(self, runner: Any) -> None:
        self._runner, self._batch = runner, runner.input_batch
        self._sampler = StepSampler(runner, runner.input_batch.max_num_seqs)

    def propose(self, step: LaunchedStep, counts: Mapping[Request, int]) -> dict[Request, Drafts]:
        """Run the layer; drafts of the requests that want some."""
        batch, runner, wanting = self._batch, self._runner, list(counts)
        next_ids, last = self._next_tokens(step)
        logits = runner.predict_more(next_ids, [last[request] for request in wanting])
        proposals: dict[Request, list[int]] = {request: [] for request in wanting}
        for depth in range(max(counts.values(), default=0)):
            drawn = self._sampler.draft(wanting, logits, depth).tolist()
            kept = []
            batch.begin_step()
            for place, (request, token) in enumerate(zip(wanting, drawn, strict=True)):
                # negative where the logits are not finite: no draft
                if token >= 0:
                    proposals[request].append(token)
                    position = len(request.token_ids) + depth - 1
                    block = batch.block_tables[request.slot, position // batch.block_size :][:1]
                    if counts[request] > depth + 1 and (block >= 0).any():
                        batch.add_row(request.slot, [token], position, is_prefill=False)
                        kept.append(place)
            if not kept:
                break
            wanting = [wanting[place] for place in kept]
            tokens = list(range(len(kept)))
            logits = runner.predict_more(batch.ids_remove_padding[tokens], tokens, kept)
        return {request: Drafts(tokens) for request, tokens in proposals.items()}

    def _next_tokens(self, step: LaunchedStep) -> tuple[Int64, dict[Request, int]]:
        """The token after each one of the step, and the last token that stands of each request.

        Of those that go on; one that has ended has no slot.
        """
        batch, last = self._batch, {}
        next_ids, ends = batch.next_tokens(), batch.seq_lens_this_time.cumsum()
        for request in step.sampling:
            if request.slot >= 0:
                rejected = step.num_rejected.get(request, 0)
                last[request] = int(ends[request.slot]) - 1 - rejected
                next_ids[last[request]] = request.token_ids[-1]
        return next_ids, last


class DeviceMtpDrafter(MtpDrafter):
    """The same on a device, queued before the tokens of a step have come that is in flight.

    Drafts stay on the device, where later steps find them as pending tokens. Further drafts are
    queued for all requests because the host does not know where a row ends. Drafts past the blocks
    of a row lack a key and are accepted less often.

    Args:
        runner: has `draws`, `draft` and the `forward_meta` of a step.
    """

    def propose(self, step: LaunchedStep, counts: Mapping[Request, int]) -> dict[Request, Drafts]:
        """Queue the layer and the drafts, from what was drawn or the host has sampled."""
        requests, runner, draws = step.sampling, self._runner, self._runner.draws
        if step.draw is None:
            next_ids, last = self._next_tokens(step)
            requests = list(last)
            places = [
                (place, request.slot, request.num_output_tokens, len(request.token_ids) - 1)
                for request, place in last.items()
            ]
            draws.go_on(runner.forward_meta, next_ids, places)
        runner.draft(len(requests), max(counts.values(), default=0))
        return {
            request: Drafts(
                [draws.buffer.draft(depth, row) for depth in range(counts[request])],
                is_pending=True,
            )
            for row, request in enumerate(requests)
            if request in counts
        }
