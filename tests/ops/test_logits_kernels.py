"""Both kernels of indexer scores against sums in doubles, on all memories.

"pages" takes every type and width, "tiles" fp8_ds_mla and bfloat16 caches on tensor cores, by a
schedule.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fd_dsa.ops.key_bounds import positions_to_slots
from fd_dsa.ops.logits.host_scores import score_gathered
from fd_dsa.ops.topk import select_positions
from tests.kernel_memory import KernelMemory
from tests.ops.logits_case import CODES, DIM, FP8, POISONED, Case, Scorer, make
from tests.ops.paged_rows import LARGE_ROWS, SMALL_ROWS, paged_rows

pytestmark = pytest.mark.triton

PAGE = 64
# query and cache
TYPES = (
    *(("float32", cache) for cache in ("float32", "bfloat16", "int16")),
    *(("bfloat16", cache) for cache in ("bfloat16", "float32")),
    *((codes, FP8) for codes in CODES),
)
# a first chunk, a decode row, a chunk after a prefix, rows of 2 and 3 drafts, a lone token
ROWS = ((0, 5), (130, 1), (60, 6), (125, 3), (63, 2), (0, 1))
# first and other tokens of a tile
FORMS = [(1, 0), (2, 0), (2, 1), (2, 2), (4, 4)]
KERNELS = ["pages", "tiles"]
# query, cache and block size of tiles
TILED = [
    ("uint8", FP8, 64),
    ("uint8", FP8, 32),
    ("bfloat16", "bfloat16", 64),
    ("bfloat16", "bfloat16", 32),
]


def lone(kernel: str, *rows: tuple[int, int]) -> Case:
    """Rows of a cache that the kernel takes, without padding."""
    types = ("float32", "float32") if kernel == "pages" else ("uint8", FP8)
    return make(paged_rows(rows, PAGE, num_padded=0), *types)


@pytest.mark.parametrize(("q_dtype", "cache_dtype"), TYPES)
def test_types_of_a_mixed_step(kernel_memory: KernelMemory, q_dtype: str, cache_dtype: str) -> None:
    case = make(paged_rows(SMALL_ROWS, 16), q_dtype, cache_dtype, dim=24)
    Scorer(kernel_memory, case, "pages").check()
    if kernel_memory.large:
        case = make(paged_rows(LARGE_ROWS, 64), q_dtype, cache_dtype, heads=64)
        Scorer(kernel_memory, case, "pages").check()


@pytest.mark.parametrize("cache_dtype", ["float32", FP8])
@pytest.mark.parametrize(
    ("heads", "dim", "block_size"), [(64, 128, 64), (32, 128, 64), (17, 40, 7), (1, 4, 1)]
)
def test_sizes(
    kernel_memory: KernelMemory, cache_dtype: str, heads: int, dim: int, block_size: int
) -> None:
    q_dtype = "float32" if cache_dtype == "float32" else "uint8"
    step = paged_rows(((65, 1), (0, 2)), block_size)
    case = make(step, q_dtype, cache_dtype, heads=heads, dim=dim)
    Scorer(kernel_memory, case, "pages").check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("q_dtype", "cache_dtype", "block_size"), TILED)
def test_forms_of_tiles(
    kernel_memory: KernelMemory,
    form: tuple[int, int],
    q_dtype: str,
    cache_dtype: str,
    block_size: int,
) -> None:
    case = make(paged_rows(ROWS, block_size), q_dtype, cache_dtype)
    Scorer(kernel_memory, case, form=form).check()


@pytest.mark.parametrize(("q_dtype", "cache_dtype", "block_size"), TILED)
def test_blocks_that_are_missing_from_the_pages_of_tiles(
    kernel_memory: KernelMemory, q_dtype: str, cache_dtype: str, block_size: int
) -> None:
    """Each of the blocks, and an odd number of them, in a table without more entries."""
    step = paged_rows(((3 * block_size - 7, 2), (5, 1)), block_size)
    tables = step.block_tables[:, :3].copy()
    for missing in range(3):
        short = tables.copy()
        short[0, missing] = (-1, step.num_blocks, -1)[missing]
        case = make(step, q_dtype, cache_dtype)
        case = replace(case, step=replace(step, block_tables=short))
        scorer = Scorer(kernel_memory, case, form=(1, 1))
        found = scorer.run()
        scorer.case = replace(case, step=step)
        lost = np.arange(3 * block_size) // block_size == missing
        for token in range(2):
            line, window = found[token], int(step.window[token])
            assert np.isneginf(line[:window][lost[:window]]).all()
            scorer.check_keys(line, token, np.flatnonzero(~lost[:window]))
        assert (found[:2, step.window[1] :] == POISONED).all()
        scorer.check_keys(found[2], 2, np.arange(6))


@pytest.mark.parametrize(("q_dtype", "cache_dtype", "block_size"), TILED)
def test_prompts_without_windows(
    kernel_memory: KernelMemory, q_dtype: str, cache_dtype: str, block_size: int
) -> None:
    """Their tokens see the keys up to their positions, as those of decode rows do."""
    step = paged_rows(ROWS, block_size)
    # the first tokens of a row may have no key at all
    positions = np.where(np.arange(step.num_tokens) < 2, -1, step.position_ids)
    window = np.where(step.batch_ids < 0, 0, positions + 1)
    case = make(replace(step, position_ids=positions, window=window), q_dtype, cache_dtype)
    scorer = Scorer(kernel_memory, case, chunk_tokens=11)
    scorer.meta.num_prefill_tokens, scorer.meta.seq_lens_encoder = 7, None
    scorer.check()


@pytest.mark.parametrize("cache_dtype", [FP8, "bfloat16"])
@pytest.mark.parametrize("heads", [1, 16, 24, 64, 128])
def test_heads_of_tiles(kernel_memory: KernelMemory, heads: int, cache_dtype: str) -> None:
    q_dtype = CODES[heads == 1] if cache_dtype == FP8 else cache_dtype
    case = make(paged_rows(((65, 1), (0, 2)), PAGE), q_dtype, cache_dtype, heads=heads)
    Scorer(kernel_memory, case, form=(1, 1)).check()


@pytest.mark.parametrize("num_programs", [1, 2, 7, 40])
def test_programs(kernel_memory: KernelMemory, num_programs: int) -> None:
    case = make(paged_rows(((300, 3), (10, 1), (500, 1)), PAGE))
    Scorer(kernel_memory, case, form=(2, 1), num_programs=num_programs).check()


@pytest.mark.parametrize("cached", [62, 63, 64, 65, 128])
def test_windows_at_the_edges_of_pages(kernel_memory: KernelMemory, cached: int) -> None:
    # the last page of a tile may be seen by its last token alone
    Scorer(kernel_memory, make(paged_rows(((cached, 4), (cached, 1)), PAGE))).check()


@pytest.mark.parametrize("form", [None, (2, 1), (4, 4)])
def test_prompt_tokens_score_the_keys_of_their_windows(
    kernel_memory: KernelMemory, form: tuple[int, int] | None
) -> None:
    rows = ((0, 5), (130, 1), (60, 9), (125, 3), (63, 2), (0, 9))
    kernel, tile = ("tiles", form) if form else ("pages", (2, 2))
    for seed, chunk in enumerate((None, 4, None)):
        step = paged_rows(rows, PAGE).with_windows((0, 2, 4, 5), seed)
        Scorer(kernel_memory, make(step), kernel, tile, chunk_tokens=chunk).check()


@pytest.mark.parametrize(
    ("kernel", "chunk_tokens"), [("pages", 4), ("tiles", 1), ("tiles", 4), ("tiles", 7)]
)
def test_chunks(kernel_memory: KernelMemory, kernel: str, chunk_tokens: int) -> None:
    case = make(paged_rows(ROWS, PAGE))
    Scorer(kernel_memory, case, kernel, chunk_tokens=chunk_tokens).check()


def test_a_tile_without_a_long_window_is_left_out(kernel_memory: KernelMemory) -> None:
    # tiles of 2: those that end at the windows 98, 100, 102 and 103
    case = make(paged_rows(((96, 7), (40, 1)), PAGE))
    scored = [False] * 4 + [True] * 3 + [False] * 4
    Scorer(kernel_memory, case, form=(2, 0), least=100).check(scored=scored)


def test_windows_that_grow_after_the_launch_was_made(kernel_memory: KernelMemory) -> None:
    # launches of a graph: the same arguments, read again
    m, case = kernel_memory, make(paged_rows(((70, 1), (3, 1), (200, 2)), PAGE))
    step = case.step
    shorter = replace(
        step,
        position_ids=step.position_ids - 60 * (step.window > 70),
        window=np.where(step.window > 70, step.window - 60, step.window),
    )
    scorer = Scorer(m, replace(case, step=shorter), form=(1, 1), width=300)
    scorer.check()
    # the tables are those of the long rows
    scorer.meta.position_ids[:] = m.put(step.position_ids)
    scorer.case, scorer.logits = case, m.poisoned(tuple(scorer.logits.shape), "float32")
    scorer.check()


def test_scores_at_a_distance(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    scorer = Scorer(m, make(paged_rows(((100, 3),), PAGE, num_padded=1)), form=(2, 1))
    wide = m.poisoned((4, 2 * 106), "float32")
    scorer.fill()
    scorer.score(logits=wide[:, :106])
    found = m.get(wide)
    scorer.check(found[:, :106])
    assert (found[:, 106:] == POISONED).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_position_past_the_scores_writes_no_other_row(
    kernel_memory: KernelMemory, kernel: str
) -> None:
    # positions are read when the kernel runs, and may be more than the host believes
    scorer = Scorer(kernel_memory, lone(kernel, (140, 3)), kernel, width=70)
    if scorer.is_tiled:
        scorer.fill()
    scorer.score(logits=scorer.logits[:2])
    found = kernel_memory.get(scorer.logits)
    for token in range(2):
        scorer.check_keys(found[token], token, np.arange(70))
    assert (found[2:] == POISONED).all()


def test_rows_that_the_schedule_has_and_the_scores_have_not(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    scorer = Scorer(m, lone("tiles", (100, 4)))
    scorer.fill()
    scorer.score(logits=scorer.logits[1:3], first=1)
    assert (m.get(scorer.logits) == POISONED).all()
    scorer.score(logits=scorer.logits[:2])
    found = m.get(scorer.logits)
    assert (found[2:] == POISONED).all() and not (found[:2, :101] == POISONED).any()


def test_keys_that_no_row_has_are_not_looked_at(kernel_memory: KernelMemory) -> None:
    scorer = Scorer(kernel_memory, lone("pages", (140, 1)), "pages")
    scorer.meta.max_seqlen_k = 64
    found = scorer.run()[0]
    scorer.check_keys(found, 0, np.arange(64))
    assert (found[64:] == POISONED).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_position_past_the_table_scores_lowest(kernel_memory: KernelMemory, kernel: str) -> None:
    case = lone(kernel, (3, 1), (5, 1))
    end = PAGE * case.step.block_tables.shape[1]
    scorer = Scorer(kernel_memory, case, kernel, (1, 0), width=end + 3)
    scorer.meta.position_ids[:] = kernel_memory.put(np.array([end + 2, 5]))
    # the entry after a row's table is the first of the next row's
    assert np.isneginf(scorer.run()[0, end:]).all()


def test_nothing_after_the_queries_is_read(kernel_memory: KernelMemory) -> None:
    case = lone("pages", (40, 1))
    scorer = Scorer(kernel_memory, case, "pages")
    after = np.full((4, *case.q_stored.shape[1:]), np.nan, np.float32)
    scorer.inputs[0] = kernel_memory.put(np.concatenate([case.q_stored, after]))[:1]
    scorer.check()


@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_without_a_block_score_lowest(kernel_memory: KernelMemory, kernel: str) -> None:
    m, case = kernel_memory, lone(kernel, (200, 2))
    scorer = Scorer(m, case, kernel)
    tables = case.step.block_tables.copy()
    tables[0, [0, 2]] = -1, case.step.num_blocks
    scorer.meta.block_tables = m.put(tables)
    found = scorer.run()
    assert np.isneginf(found[:, :64]).all() and np.isneginf(found[:, 128:192]).all()
    scorer.check_keys(found[1], 1, np.r_[64:128, 192:202])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_nan_key_scores_nan_and_spoils_no_other(kernel_memory: KernelMemory, kernel: str) -> None:
    m, case = kernel_memory, lone(kernel, (100, 1))
    slots, spoiled = case.step.key_slots(0), [7]
    if kernel == "pages":
        case.cache.reshape(-1, DIM)[slots[7]] = np.nan
    else:
        pages = case.cache.reshape(len(case.cache), -1)
        block, offset = divmod(int(slots[7]), PAGE)
        pages[block, PAGE * DIM + 4 * offset :][:4] = np.array([np.nan], np.float32).view(np.uint8)
        if m.on_gpu:
            # the interpreter takes the code of NaN for a number
            block, offset = divmod(int(slots[70]), PAGE)
            pages[block, offset * DIM] = 0xFF
            spoiled.append(70)
    scorer = Scorer(m, case, kernel)
    found = scorer.run()[0]
    assert np.flatnonzero(np.isnan(found[:101])).tolist() == spoiled
    scorer.check_keys(found, 0, np.setdiff1d(np.arange(101), spoiled))


def test_a_table_for_a_million_keys(kernel_memory: KernelMemory) -> None:
    case = make(paged_rows(((70, 2), (130, 1)), PAGE))
    tables = np.full((2, (1 << 20) // PAGE), -1, np.int32)
    tables[:, : case.step.block_tables.shape[1]] = case.step.block_tables
    case = replace(case, step=replace(case.step, block_tables=tables))
    Scorer(kernel_memory, case, num_programs=9).check()


@pytest.mark.parametrize("form", FORMS[1:4])
@pytest.mark.parametrize("heads", [64, 32, 16])
@pytest.mark.parametrize(("q_dtype", "cache_dtype", "block_size"), TILED)
def test_real_sizes(
    kernel_memory: KernelMemory,
    form: tuple[int, int],
    heads: int,
    q_dtype: str,
    cache_dtype: str,
    block_size: int,
) -> None:
    if not kernel_memory.large:
        pytest.skip("small sizes alone in the interpreter")
    case = make(paged_rows(LARGE_ROWS, block_size), q_dtype, cache_dtype, heads=heads)
    scorer = Scorer(kernel_memory, case, form=form, num_programs=132 * 4)
    found = scorer.run()
    scorer.check(found)
    scorer.score()
    np.testing.assert_array_equal(kernel_memory.get(scorer.logits), found)


def test_the_choice_of_the_cpu(kernel_memory: KernelMemory) -> None:
    pytest.importorskip("paddle", reason="the CPU's GEMMs are Paddle's")
    m = kernel_memory
    step = paged_rows(LARGE_ROWS if m.large else SMALL_ROWS, 64, num_padded=0)
    case = make(step, "float32", "float32", heads=64 if m.large else 16)
    k, table = 2048 if m.large else 12, step.block_tables
    found = Scorer(m, case, "pages").run()
    for token in range(step.num_tokens):
        one, window = slice(token, token + 1), step.window[token : token + 1]
        slots, batch = step.key_slots(token), step.batch_ids[one]
        scores = score_gathered(case.q_stored[one], case.weights[one], case.cache, slots)
        wanted, chosen = (
            positions_to_slots(select_positions(x, window, k), batch, table, 64)
            for x in (scores, found[one])
        )
        np.testing.assert_array_equal(chosen, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_past_two_to_the_31_bytes(kernel_memory: KernelMemory, kernel: str) -> None:
    if kernel_memory.name != "torch":
        pytest.skip("torch alone writes into two gigabytes in place")
    m, case = kernel_memory, make(paged_rows(ROWS, PAGE))
    first, tables = (2**31 + 2**24) // 8448, case.step.block_tables
    near, far = Scorer(m, case, kernel), Scorer(m, case, kernel)
    far.inputs[2] = m.poisoned((first + case.step.num_blocks, 64, 132), "uint8")
    far.inputs[2][first:] = m.put(case.cache)
    far.meta.block_tables = m.put(np.where(tables < 0, -1, tables + first).astype(np.int32))
    np.testing.assert_array_equal(far.run(), near.run())


def test_no_rows_is_no_launch(kernel_memory: KernelMemory) -> None:
    scorer = Scorer(kernel_memory, make(paged_rows(((9, 5),), PAGE)))
    scorer.score(logits=scorer.logits[:0])
    assert (kernel_memory.get(scorer.logits) == POISONED).all()
