"""Scores of a long step: more of them than 31 bits can count, on memory of a GPU.

Source of the failure: mlx-lm #1454, whose sum gave zeros for very large tensors, so that beyond
128k tokens only the last keys were seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernel_memory import KernelMemory
from tests.ops.paged_rows import PagedRows, paged_rows

BLOCK, K, NEEDLE = 64, 8, 5
# (keys in the cache before the step, tokens of the step)
SMALL, LARGE = (30, 6), (131_072 - 16_416, 16_416)


def empty(m: KernelMemory, shape: tuple[int, int]) -> Any:
    """Return poisoned float32 memory, made on the device if it is large."""
    if m.name != "torch":
        return m.poisoned(shape, "float32")
    import torch

    return torch.full(shape, float("nan"), device="cuda", dtype=torch.float32)


def layer_inputs(m: KernelMemory, step: PagedRows) -> list[Any]:
    """Queries that all look for the key at `NEEDLE`, their weights, and the cache."""
    dim, tokens = 32, step.num_tokens
    keys = np.zeros((step.num_blocks * BLOCK, dim), np.float32)
    # keys in the order of their age, so that a choice by score alone is known
    slots = step.key_slots(tokens - 1)
    keys[slots, 0] = np.arange(len(slots), dtype=np.float32) / 2**18
    keys[slots[NEEDLE], 0] = 4
    queries = np.zeros((tokens, 1, dim), np.float32)
    queries[:, 0, 0] = 1
    return [
        m.put(queries),
        m.put(np.ones((tokens, 1), np.float32)),
        m.put(keys.reshape(-1, BLOCK, dim)),
    ]


def scored(m: KernelMemory) -> tuple[PagedRows, Any]:
    """A step, on a GPU one whose last tokens come after 2^31 scores, and its scores."""
    from fd_dsa.ops.logits.triton_kernel import score_pages

    cached, new = LARGE if m.name == "torch" else SMALL
    assert m.name != "torch" or (cached + new) * (new - 16) > 2**31
    step = paged_rows(((cached, new),), BLOCK, num_padded=0)
    logits = empty(m, (new, int(step.window.max())))
    score_pages(*layer_inputs(m, step), step.meta(m), logits)
    return step, logits


def best_positions(step: PagedRows) -> dict[int, list[int]]:
    """Return the expected keys of some tokens, at 2^31 scores too: the needle and the last keys."""
    edge, new = 2**31 // int(step.window.max()), step.num_tokens
    tokens = {0, 1, new - 2, new - 1, edge - 1, edge, edge + 1} & set(range(new))
    ends = {token: int(step.position_ids[token]) + 1 for token in tokens}
    return {token: [NEEDLE, *range(end - K + 1, end)] for token, end in ends.items()}


@pytest.mark.slow
def test_the_first_keys_are_found_whatever_the_number_of_scores(
    kernel_memory: KernelMemory,
) -> None:
    from fd_dsa.ops.topk.triton_kernel import select_slots

    m, (step, logits) = kernel_memory, scored(kernel_memory)
    meta, slots = step.meta(m), m.poisoned((step.num_tokens, K), "int32")
    tokens = meta.position_ids, meta.batch_id_per_token, meta.block_tables
    select_slots(logits, *tokens, slots, block_size=BLOCK, num_blocks=step.num_blocks)
    found = m.get(slots)
    for token, positions in best_positions(step).items():
        places = {int(slot): p for p, slot in enumerate(step.key_slots(token))}
        assert [places[slot] for slot in found[token].tolist()] == positions
        row, last = m.get(logits[token : token + 1])[0], positions[-1]
        assert row[NEEDLE] == 4 and row[last] == np.float32(last / 2**18)
