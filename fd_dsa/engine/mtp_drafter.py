"""Drafts of the checkpoint's own layer for multi-token prediction (MTP)."""

from __future__ import annotations

from collections.abc import Mapping

from fd_dsa.engine.batch import Drafts, ScheduledBatch
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampler import StepSampler
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.protocol import DeviceMtpRunner, MtpRunner
from fd_dsa.tensor import Int64


class MtpDrafter:
    """Drafter of the method "mtp", which runs the layer after each step for all of its tokens.

    For token i the layer needs the hidden state of i and token i + 1. It also runs if no request
    wants a draft, because missing entries of its caches cannot be filled later. For each further
    draft it runs again, for one token a row, on its own hidden state. The next step overwrites the
    entries that this leaves in the caches. Drafts are sampled as the tokens of the request will be:
    with its parameters, and the random number of their position.

    Args:
        runner: runner on a CPU whose model has the layer.
    """

    is_layer, prior_acceptance_rate = True, 0.85

    def __init__(self, runner: MtpRunner) -> None:
        self._runner, self._input_batch = runner, runner.input_batch
        self._sampler = StepSampler(runner, runner.input_batch.max_num_seqs)

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        """Run the layer, and return drafts of the requests that want some."""
        rows, runner, wanting = self._input_batch, self._runner, list(counts)
        next_ids, last = next_tokens(rows, batch)
        logits = runner.predict_more(next_ids, [last[request] for request in wanting])
        proposals: dict[Request, list[int]] = {request: [] for request in wanting}
        for depth in range(max(counts.values(), default=0)):
            sampled = self._sampler.draft(wanting, logits, depth).tolist()
            kept = []
            rows.begin_step()
            for place, (request, token) in enumerate(zip(wanting, sampled, strict=True)):
                # negative if the logits are not finite: no draft
                if token >= 0:
                    proposals[request].append(token)
                    position = len(request.token_ids) + depth - 1
                    block = rows.block_tables[request.batch_row, position // rows.block_size :][:1]
                    if counts[request] > depth + 1 and (block >= 0).any():
                        rows.add_row(request.batch_row, [token], position, is_prefill=False)
                        kept.append(place)
            if not kept:
                break
            wanting = [wanting[place] for place in kept]
            tokens = list(range(len(kept)))
            logits = runner.predict_more(rows.token_ids[tokens], tokens, kept)
        return {request: Drafts(tokens) for request, tokens in proposals.items()}


class DeviceMtpDrafter:
    """MTP drafter on a device, which enqueues drafts before the host has the tokens of the step.

    Drafts stay on the device. Later steps name them as pending tokens. Further drafts are enqueued
    for all requests, because the host does not know which drafts of a row are accepted. Drafts past
    the blocks of a row lack a key and are accepted less often.

    Args:
        runner: runner on a device whose model has the layer.
    """

    is_layer, prior_acceptance_rate = MtpDrafter.is_layer, MtpDrafter.prior_acceptance_rate

    def __init__(self, runner: DeviceMtpRunner) -> None:
        self._runner, self._input_batch = runner, runner.input_batch

    def propose(
        self, batch: ScheduledBatch, counts: Mapping[Request, int]
    ) -> dict[Request, Drafts]:
        """Enqueue the layer and the drafts, after samples of the device or of the host."""
        requests, runner, buffer = batch.sampling, self._runner, self._runner.token_buffer
        if batch.future is None:
            next_ids, last = next_tokens(self._input_batch, batch)
            requests = list(last)
            places = [
                (place, request.batch_row, request.num_output_tokens, len(request.token_ids) - 1)
                for request, place in last.items()
            ]
            runner.seed_drafts(next_ids, places)
        runner.draft(len(requests), max(counts.values(), default=0))
        return {
            request: Drafts(
                [buffer.draft(depth, row) for depth in range(counts[request])],
                is_pending=True,
            )
            for row, request in enumerate(requests)
            if request in counts
        }


def next_tokens(rows: InputBatch, batch: ScheduledBatch) -> tuple[Int64, dict[Request, int]]:
    """Return the token after each token of a step, whose tokens the host has.

    Args:
        rows: rows of the step.
        batch: step, whose tokens have been processed.

    Returns:
        int64 [num_tokens]; and for each running request the flat index of the last token that was
        accepted. Requests that have ended are left out, because they have no row.
    """
    last: dict[Request, int] = {}
    next_ids, ends = rows.next_tokens(), rows.num_scheduled_tokens.cumsum()
    for request in batch.sampling:
        if request.batch_row >= 0:
            last[request] = int(ends[request.batch_row]) - 1 - batch.num_rejected(request)
            next_ids[last[request]] = request.token_ids[-1]
    return next_ids, last
