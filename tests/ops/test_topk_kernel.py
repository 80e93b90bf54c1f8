"""The top-k kernel against a sort of every row, on all memories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.ops.key_bounds import positions_to_slots
from fd_dsa.ops.topk import select_positions
from tests.kernel_memory import POISON, KernelMemory
from tests.ops.paged_rows import LARGE_ROWS, SMALL_ROWS, PagedRows, paged_rows
from tests.reference.topk import ref_slot, ref_topk

POISONED = int(np.full(4, POISON, np.uint8).view(np.int32)[0])
DENORMAL = float(np.uint32(1).view(np.float32))
NEGATIVE_NAN = float(np.uint32(0xFFC00000).view(np.float32))
SPECIAL = np.float32(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, NEGATIVE_NAN, DENORMAL, -DENORMAL, 3.4e38]
)
KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "plateau": lambda rng, shape: rng.integers(-1, 2, shape) * rng.choice([-0.0, 1.0], shape),
    "special": lambda rng, shape: rng.choice(SPECIAL, shape),
    "denormal": lambda rng, shape: rng.integers(-9, 9, shape) * DENORMAL,
    "equal": lambda rng, shape: np.zeros(shape),
}


def scores_of(kind: str, step: PagedRows, seed: int = 0) -> np.ndarray:
    """Return scores [num_tokens, longest window + 5], infinities and NaN in unused columns."""
    rng = np.random.default_rng(seed)
    ends, first = (step.first + step.window)[:, None], step.first[:, None]
    shape = (step.num_tokens, int(ends.max()) + 5)
    scores = KINDS[kind](rng, shape).astype(np.float32)
    column = np.arange(shape[1])
    unseen = (column < first) | (column >= ends)
    return np.where(unseen, rng.choice(np.float32([np.nan, np.inf]), shape), scores)


def run(m: KernelMemory, step: PagedRows, scores: Any, k: int, **options: int) -> np.ndarray:
    """Slots of the tokens whose scores, an array or a tensor, are given."""
    from fd_dsa.ops.key_bounds import prompt_windows
    from fd_dsa.ops.topk import triton_kernel

    slots, meta = m.poisoned((step.num_tokens, k), "int32"), step.meta(m)
    triton_kernel.select_slots(
        m.put(scores) if isinstance(scores, np.ndarray) else scores,
        *(meta.position_ids, meta.batch_id_per_token, meta.block_tables, slots),
        block_size=step.block_size,
        num_blocks=step.num_blocks,
        windows=prompt_windows(meta),
        **options,
    )
    return m.get(slots)


def wanted(step: PagedRows, scores: np.ndarray, k: int) -> np.ndarray:
    """The oracle's slots of all tokens."""
    rows = []
    for token, line in enumerate(scores):
        first, table = int(step.first[token]), step.block_tables[step.batch_ids[token]]
        best = ref_topk(line[first:], int(step.window[token]), k)
        positions = [p if p < 0 else first + p for p in best]
        rows.append([ref_slot(p, table, step.block_size) for p in positions])
    return np.array(rows, np.int32)


@pytest.mark.parametrize(
    ("kind", "k"),
    [
        *((kind, 4) for kind in KINDS),
        *((kind, k) for kind in ("plateau", "special") for k in (1, 16)),
    ],
)
def test_set_and_order(kernel_memory: KernelMemory, kind: str, k: int) -> None:
    step = paged_rows(SMALL_ROWS, 16)
    scores = scores_of(kind, step, seed=k)
    np.testing.assert_array_equal(run(kernel_memory, step, scores, k), wanted(step, scores, k))


@pytest.mark.parametrize(
    ("k", "kinds"),
    [(1, ["normal"]), (5, ["normal", "plateau", "equal"]), (30, ["normal", "plateau"])],
)
def test_prompt_tokens_choose_among_the_keys_of_their_windows(
    kernel_memory: KernelMemory, k: int, kinds: list[str]
) -> None:
    rows = ((0, 9), (37, 1), (20, 9), (63, 2), (0, 1), (30, 9))
    for seed, kind in enumerate(kinds):
        step = paged_rows(rows, 16).with_windows((0, 2, 5), seed)
        scores = scores_of(kind, step, seed)
        np.testing.assert_array_equal(run(kernel_memory, step, scores, k), wanted(step, scores, k))


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_block_sizes(kernel_memory: KernelMemory, block_size: int) -> None:
    step = paged_rows(SMALL_ROWS, block_size)
    scores = scores_of("plateau", step)
    np.testing.assert_array_equal(run(kernel_memory, step, scores, 9), wanted(step, scores, 9))


@pytest.mark.parametrize("window", [1, 7, 8, 9, 1023, 1024, 1025, 2050])
def test_windows_around_k_and_the_tile(kernel_memory: KernelMemory, window: int) -> None:
    step = paged_rows(((window - 1, 1),), 64, num_padded=0)
    scores = scores_of("plateau", step, seed=window)
    np.testing.assert_array_equal(run(kernel_memory, step, scores, 8), wanted(step, scores, 8))


def test_a_position_past_the_scores_looks_at_no_other_row(kernel_memory: KernelMemory) -> None:
    # positions are read when the kernel runs, and may be more than the host believes
    step = paged_rows(((39, 1), (29, 1)), 16, num_padded=0)
    scores = np.array([[*range(20)], [*range(100, 120)]], np.float32)
    found = run(kernel_memory, step, scores, 4)
    for token, slots in enumerate(found):
        assert slots.tolist() == step.key_slots(token)[16:20].tolist()


def test_a_position_past_the_table_has_no_slot(kernel_memory: KernelMemory) -> None:
    step = paged_rows(((3, 1), (5, 1)), 4, num_padded=0)
    step.position_ids[0] = 4 * step.block_tables.shape[1] + 2
    scores = np.zeros((2, int(step.position_ids[0]) + 1), np.float32)
    scores[0, -3:] = 1
    # the entry after the row's table is the first of the next row's
    assert run(kernel_memory, step, scores, 3)[0].tolist() == [-1, -1, -1]


def test_a_short_window_needs_no_scores(kernel_memory: KernelMemory) -> None:
    step = paged_rows(SMALL_ROWS, 16)
    one = np.zeros((1, 1), np.float32)
    found = run(kernel_memory, step, one, 70, num_rows=step.num_tokens)
    anything = np.zeros((step.num_tokens, 70), np.float32)
    np.testing.assert_array_equal(found, wanted(step, anything, 70))


def test_a_chunk_of_tokens_leaves_the_others_alone(kernel_memory: KernelMemory) -> None:
    step = paged_rows(SMALL_ROWS, 16)
    scores = scores_of("normal", step)
    found = run(kernel_memory, step, scores[6:9], 4, first_token=6)
    np.testing.assert_array_equal(found[6:9], wanted(step, scores, 4)[6:9])
    assert (found[:6] == POISONED).all() and (found[9:] == POISONED).all()


def test_keys_without_a_block_have_no_slot(kernel_memory: KernelMemory) -> None:
    step = paged_rows(((40, 1),), 16, num_padded=0)
    slots = step.key_slots(0)
    step.block_tables[0, 0] = -1
    step.block_tables[0, 1] = step.num_blocks
    found = run(kernel_memory, step, scores_of("equal", step), 50)
    assert (found[0, :32] == -1).all() and (found[0, 41:] == -1).all()
    np.testing.assert_array_equal(found[0, 32:41], slots[32:41])


def test_the_choice_of_the_cpu(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    step = paged_rows(LARGE_ROWS if m.large else SMALL_ROWS, 64)
    k = 2048 if m.large else 12
    for kind in ("normal", "plateau"):
        scores = scores_of(kind, step, seed=3)
        rows = np.maximum(step.batch_ids, 0)
        positions = select_positions(scores, step.window, k)
        slots = positions_to_slots(positions, rows, step.block_tables, 64)
        np.testing.assert_array_equal(run(m, step, scores, k), slots)


def test_the_same_bits_every_time(kernel_memory: KernelMemory) -> None:
    step = paged_rows(LARGE_ROWS if kernel_memory.large else SMALL_ROWS, 64)
    scores = scores_of("plateau", step)
    first = run(kernel_memory, step, scores, 20)
    for _ in range(5 if kernel_memory.large else 1):
        np.testing.assert_array_equal(run(kernel_memory, step, scores, 20), first)


def test_rows_of_scores_may_lie_apart(kernel_memory: KernelMemory) -> None:
    m, step = kernel_memory, paged_rows(SMALL_ROWS, 16)
    scores = scores_of("normal", step)
    wide = np.full((len(scores), scores.shape[1] + 37), np.inf, np.float32)
    wide[:, : scores.shape[1]] = scores
    found = run(m, step, m.put(wide)[:, : scores.shape[1]], 4)
    np.testing.assert_array_equal(found, wanted(step, scores, 4))
