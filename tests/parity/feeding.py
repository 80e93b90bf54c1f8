"""Feeds the reference's selections to a ModelRunner: indexer keys and routed experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from fd_dsa.attention import DSAAttentionBackend, DSABackendConfig
from fd_dsa.models.moe import NoAuxTopkGate
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.ops.key_bounds import positions_to_slots
from fd_dsa.runner import ModelRunner
from tests.parity.choices import Choice


class FeedingBackend(DSAAttentionBackend):
    """A backend whose own selection gives way to the fed one, where there is one.

    Args:
        config: see DSAAttentionBackend.
        choices: what to feed, by row of the batch.
    """

    def __init__(self, config: DSABackendConfig, choices: Mapping[int, Sequence[Choice]]) -> None:
        super().__init__(config)
        self.waiting = {(row, choice) for row, several in choices.items() for choice in several}
        self._choices = tuple(self.waiting)

    def fed(self, kind: str, layer: int) -> list[tuple[int, list[int]]]:
        """(flat token, chosen) of the tokens of this step that are fed in a layer."""
        step = self.attention_metadata
        num_tokens = int(as_numpy(step.cu_seqlens_q)[-1])
        rows = as_numpy(step.batch_id_per_token)[:num_tokens]
        positions = as_numpy(step.position_ids)[:num_tokens]
        found = []
        for row, choice in self._choices:
            if (choice.kind, choice.layer) == (kind, layer):
                tokens = np.flatnonzero((rows == row) & (positions == choice.position))
                found += [(int(token), list(choice.chosen)) for token in tokens]
                if len(tokens):
                    self.waiting.discard((row, choice))
        return found

    def select(self, q: Any, weights: Any, layer_id: int, forward_meta: Any) -> Any:
        """See DSAAttentionBackend; then the fed tokens get the slots of their fed positions."""
        selection = super().select(q, weights, layer_id, forward_meta)
        step = self.attention_metadata
        for token, chosen in self.fed("indexer", layer_id):
            as_numpy(selection)[token] = positions_to_slots(
                np.array([chosen], np.int32),
                as_numpy(step.batch_id_per_token)[[token]],
                as_numpy(step.block_tables),
                self.block_size,
            )
        return selection


def route(
    own: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    gate: NoAuxTopkGate,
    layer: int,
    backend: FeedingBackend,
    x: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The gate's own experts and weights, replaced for the fed tokens."""
    experts, weights = own(x)
    for token, chosen in backend.fed("router", layer):
        experts[token] = chosen
        scores = 1.0 / (1.0 + np.exp(-gate.weight.matmul(x[token : token + 1])[0, chosen]))
        share = scores / (scores.sum() + 1e-20) if gate.norm_topk_prob else scores
        weights[token] = share * gate.scaling
    return experts, weights


@contextmanager
def feeding(runner: ModelRunner, choices: Mapping[int, Sequence[Choice]]) -> Iterator[None]:
    """Feed `choices`, by row of the batch, to the steps inside; each of them must come up.

    The runner must not have run before.
    """
    backend = FeedingBackend(runner.attn_backends[0].config, choices)
    runner.attn_backends[0] = backend
    with ExitStack() as stack:
        for index, layer in enumerate(runner.model.layers):
            gate = getattr(layer.mlp, "gate", None)
            if gate is not None:
                fed = partial(route, gate.forward, gate, index, backend)
                stack.enter_context(mock.patch.object(gate, "forward", fed))
        yield
    assert not backend.waiting, f"not fed: {sorted(map(str, backend.waiting))}"
