"""Drafts of a layer for multi-token prediction on a device: nothing waits, nothing is read back."""

from __future__ import annotations

from typing import Any

from fd_dsa.ops._linear import rows_at
from fd_dsa.runner.device_draws import DeviceDraws


class DeviceDrafts:
    """Runs the layer after the draw of a step, over all of its tokens, and draws a draft a request.

    Args:
        mtp: the layer.
        draws: of the runner, with the tokens of the step and where its requests go on.
    """

    def __init__(self, mtp: Any, draws: DeviceDraws) -> None:
        self._mtp, self._draws = mtp, draws

    def queue(self, hidden: Any, step: Any, num_requests: int) -> Any:
        """Queue the layer and the first drafts; may be captured.

        Args:
            hidden: normed hidden states of the model, [num_tokens, hidden_size].
            step: the runner's record of it.
            num_requests: that may go on, at most.

        Returns:
            The layer's hidden states of the tokens that they go on from.
        """
        next_ids = step.draw.next_ids
        self._draws.fill(next_ids)
        states = self._mtp(next_ids, hidden, step)
        if not num_requests:
            return states[:0]
        last, slots, positions = self._draws.going_on(num_requests)
        kept = rows_at(states, last)
        self._draws.draft(self._mtp.compute_logits(kept), 0, slots, positions)
        return kept

    def queue_more(self, hidden: Any, step: Any, depth: int) -> Any:
        """Queue the layer on its own hidden states, and a further draft a request.

        Args:
            hidden: that `queue` or this returned.
            step: of one token a request, its last draft; `sampled` has their rows of `hidden`.
            depth: drafts before.

        Returns:
            Hidden states, as of `queue`.
        """
        states = self._mtp(step.ids_remove_padding, rows_at(hidden, step.sampled), step)
        logits = self._mtp.compute_logits(states)
        self._draws.draft(logits, depth, step.draw.slots, step.draw.positions)
        return states
