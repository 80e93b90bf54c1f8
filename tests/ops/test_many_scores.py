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
    """Poisoned float32; a large one is made on the device."""
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


@pytest.mark.slow
def test_the_first_keys_are_found_whatever_the_number_of_scores(
    kernel_memory: KernelMemory,
) -> None:
    from fd_dsa.ops.logits.triton_kernel import score_pages
    from fd_dsa.ops.topk.triton_kernel import select_slots

    m, (cached, new) = kernel_memory, LARGE if kernel_memory.name == "torch" else SMALL
    assert m.name != "torch" or (cached + new) * (new - 16) > 2**31
    step = paged_rows(((cached, new),), BLOCK, num_padded=0)
    meta, width = step.meta(m), int(step.window.max())
    logits, slots = empty(m, (new, width)), m.poisoned((new, K), "int32")
    score_pages(*layer_inputs(m, step), meta, logits)
    tokens = meta.position_ids, meta.batch_id_per_token, meta.block_tables
    select_slots(logits, *tokens, slots, block_size=BLOCK, num_blocks=step.num_blocks)
    found = m.get(slots)
    # the first and the last tokens, and those at 2^31 scores
    edge = 2**31 // width
    for token in {0, 1, new - 2, new - 1, edge - 1, edge, edge + 1} & set(range(new)):
        position = int(step.position_ids[token])
        places = {int(slot): p for p, slot in enumerate(step.key_slots(token))}
        # the needle, and the last keys before the token: their scores grow
        wanted = [NEEDLE, *range(position + 2 - K, position + 1)]
        assert [places[slot] for slot in found[token].tolist()] == wanted
        row = m.get(logits[token : token + 1])[0]
        assert row[NEEDLE] == 4 and row[position] == np.float32(position / 2**18)
