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


def step_for(m: KernelMemory) -> PagedRows:
    """One row; on a GPU its last tokens lie past 2^31 scores."""
    cached, new = LARGE if m.name == "torch" else SMALL
    if m.name == "torch":
        assert (cached + new) * (new - 16) > 2**31
    return paged_rows(((cached, new),), BLOCK, num_padded=0)


def empty(m: KernelMemory, shape: tuple[int, int]) -> Any:
    """Poisoned float32; a large one is made on the device."""
    if m.name != "torch":
        return m.poisoned(shape, "float32")
    import torch

    return torch.full(shape, float("nan"), device="cuda", dtype=torch.float32)


def scored(m: KernelMemory, step: PagedRows) -> Any:
    """Scores of a step in which every query looks for the key at `NEEDLE`, by our kernel."""
    from fd_dsa.ops.logits.triton_kernel import score_pages

    dim, tokens = 32, step.num_tokens
    keys = np.zeros((step.num_blocks * BLOCK, dim), np.float32)
    # keys in the order of their age, so that a choice by score alone is known
    slots = step.key_slots(tokens - 1)
    keys[slots, 0] = np.arange(len(slots), dtype=np.float32) / 2**18
    keys[slots[NEEDLE], 0] = 4
    queries = np.zeros((tokens, 1, dim), np.float32)
    queries[:, 0, 0] = 1
    logits = empty(m, (tokens, int(step.window.max())))
    score_pages(
        m.put(queries),
        m.put(np.ones((tokens, 1), np.float32)),
        m.put(keys.reshape(-1, BLOCK, dim)),
        m.put(step.position_ids),
        m.put(step.batch_ids),
        m.put(step.block_tables),
        logits,
        block_size=BLOCK,
    )
    return logits


def tokens_to_look_at(step: PagedRows) -> list[int]:
    """The first and the last ones, and those at 2^31 scores."""
    edge = 2**31 // int(step.window.max())
    wanted = {0, 1, step.num_tokens - 2, step.num_tokens - 1, edge - 1, edge, edge + 1}
    return sorted(token for token in wanted if 0 <= token < step.num_tokens)


def wanted_positions(position: int) -> list[int]:
    """The needle, and the last keys before the token: their scores grow."""
    return [NEEDLE, *range(position + 2 - K, position + 1)]


@pytest.mark.slow
def test_the_first_keys_are_found_whatever_the_number_of_scores(
    kernel_memory: KernelMemory,
) -> None:
    from fd_dsa.ops.topk.triton_kernel import select_slots

    m, step = kernel_memory, step_for(kernel_memory)
    logits, slots = scored(m, step), m.poisoned((step.num_tokens, K), "int32")
    select_slots(
        logits,
        m.put(step.position_ids),
        m.put(step.batch_ids),
        m.put(step.block_tables),
        slots,
        block_size=BLOCK,
        num_blocks=step.num_blocks,
    )
    found = m.get(slots)
    for token in tokens_to_look_at(step):
        position = int(step.position_ids[token])
        places = {int(slot): p for p, slot in enumerate(step.key_slots(token))}
        assert [places[slot] for slot in found[token].tolist()] == wanted_positions(position)
        row = m.get(logits[token : token + 1])[0]
        assert row[NEEDLE] == 4 and row[position] == np.float32(position / 2**18)
