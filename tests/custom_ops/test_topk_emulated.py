"""The CUDA source of top-k, its threads emulated on the CPU, against a sort.

Blocks are small and memory is scarce, so that every path is taken by short rows: registers, a list,
clusters, bounds that fail, plateaus, windows of positions.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fd_dsa.ops.topk.custom_op import TopkRows
from tests.custom_ops.building import EMULATED, SOURCES, compile_library
from tests.custom_ops.topk_rows import KINDS, best, rows_of, scores_of

POISON = -91
HELD = 0
MOST_HELD = (509, 8189)
SHARED_BYTES = 227 * 1024
EXAMPLES = settings(
    max_examples=min(120, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@cache
def library() -> Any:
    """The kernels in blocks of 64 threads, or of 128 where they are asked to be wide."""
    source = EMULATED / "topk_emulated.cc"
    return ctypes.CDLL(str(compile_library(source, EMULATED, SOURCES / "csrc")))


def check(
    scores: np.ndarray,
    lengths: Any,
    k: int,
    *,
    cluster: int = 1,
    wide: bool = False,
    capacity: int = 1024,
    num_bits: int = 1024,
    gap: int = 0,
    offset: int = 0,
) -> None:
    """The kernel chooses what a sort does, of rows `gap` floats apart, from `offset` floats on."""
    rows, width = scores.shape
    memory = np.full(rows * (width + gap) + 8, np.nan, np.float32)
    first = (-memory.ctypes.data // 4) % 4 + offset
    logits = memory[first : first + rows * (width + gap)].reshape(rows, width + gap)
    logits[:, :width] = scores
    out = np.full((rows, k), POISON, np.int32)
    counts = np.array(lengths, np.int32)
    arguments = rows_of(logits, counts, out, width, width + gap)
    numbers = int(wide), cluster, capacity, num_bits
    assert library().topk_emulated(ctypes.byref(arguments), *numbers) == 0
    np.testing.assert_array_equal(out, best(scores, lengths, k))


@EXAMPLES
@given(data=st.data())
def test_any_row_by_any_path_equals_a_sort(data: st.DataObject) -> None:
    draw = data.draw
    wide = draw(st.booleans(), "wide")
    cluster = draw(st.sampled_from([HELD, 1, 1, 2, 4, 8]), "cluster")
    most = draw(st.sampled_from([700, 6000]))
    width = draw(st.integers(1, MOST_HELD[wide] if cluster == HELD else most), "width")
    kind = draw(st.sampled_from([*KINDS]), "kind")
    scores = scores_of(kind, 2, width, draw(st.integers(0, 2**31)))
    k = draw(st.one_of(st.integers(1, width + 3), st.sampled_from([1, 2, 100, 512])), "k")
    number = st.one_of(st.integers(-2, width + 5), st.sampled_from([width, width, k, k + 1]))
    lengths = draw(st.tuples(number, number), "lengths")
    sizes = {"capacity": draw(st.sampled_from([1024, 2048])), "cluster": cluster, "wide": wide}
    sizes |= {"num_bits": draw(st.sampled_from([1024, 8192]))}
    sizes |= {"gap": draw(st.integers(0, 5)), "offset": draw(st.integers(0, 3))}
    check(scores, lengths, k, **sizes)


def expected_slots(scores: np.ndarray, bounds: np.ndarray, k: int) -> np.ndarray:
    """Slots of the best positions of each row, in blocks of 16 in reverse order."""
    out = np.full((len(scores), k), -1, np.int32)
    num_blocks = -(-scores.shape[1] // 16)
    for row, (begin, end) in enumerate(bounds.tolist()):
        chosen = best(scores[row : row + 1, begin:], [end - begin], k)[0]
        position = begin + chosen[chosen >= 0]
        out[row, : len(position)] = (num_blocks - 1 - position // 16) * 16 + position % 16
    return out


@EXAMPLES
@given(
    data=st.data(),
    cluster=st.sampled_from([HELD, 1, 2, 4]),
    wide=st.booleans(),
    width=st.integers(1, 500),
    k=st.integers(1, 90),
    num_prompts=st.integers(0, 4),
)
def test_tokens_of_prompts_choose_within_their_windows(
    data: st.DataObject, cluster: int, wide: bool, width: int, k: int, num_prompts: int
) -> None:
    """Four rows of one token. Decode rows see all keys up to their own."""
    count = st.one_of(st.just(width), st.integers(1, width))
    counts = np.array([data.draw(count) for _ in range(4)], np.int32)
    is_prompt, starts = np.arange(4) < num_prompts, np.zeros(5, np.int32)
    starts[1:] = np.cumsum(np.where(is_prompt, counts, 1))
    edge = st.one_of(st.sampled_from([0, width]), st.integers(-3, width + 3))
    windows = np.array([[data.draw(edge), data.draw(edge)] for _ in range(4)], np.int32)
    bounds = np.clip(windows, 0, counts[:, None])
    bounds[:, 1] = bounds.max(axis=1)
    bounds[~is_prompt] = np.stack([np.zeros(4), counts], 1)[~is_prompt]
    offsets = ((windows + starts[:4, None]) * is_prompt[:, None]).astype(np.int32).ravel()
    scores = scores_of(data.draw(st.sampled_from([*KINDS])), 4, width, data.draw(st.integers(0, 9)))
    out, memory = np.full((4, k), POISON, np.int32), np.full(4 * width + 8, np.nan, np.float32)
    first = (-memory.ctypes.data // 4) % 4 + data.draw(st.integers(0, 3))
    logits = memory[first : first + 4 * width].reshape(4, width)
    logits[:] = scores
    num_blocks = -(-width // 16)
    arrays = {
        "logits": logits,
        "position_ids": counts.astype(np.int64) - 1,
        "batch_ids": np.arange(4, dtype=np.int32),
        "block_tables": np.tile(np.arange(num_blocks, dtype=np.int32)[::-1], (4, 1)).copy(),
        "window_offsets": offsets,
        "key_starts": starts,
        "seq_lens_encoder": is_prompt.astype(np.int32),
        "out": out,
    }
    if not num_prompts:
        del arrays["window_offsets"], arrays["key_starts"], arrays["seq_lens_encoder"]
    arguments = TopkRows(
        **{name: array.ctypes.data for name, array in arrays.items()},
        num_rows=4,
        width=width,
        k=k,
        row_stride=width,
        table_width=num_blocks,
        block_size=16,
        num_blocks=num_blocks,
    )
    code = library().topk_emulated(ctypes.byref(arguments), int(wide), cluster, 1024, 1024)
    assert code == 0
    np.testing.assert_array_equal(out, expected_slots(scores, bounds, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster", [1, 4])
def test_kinds_of_long_rows(kind: str, cluster: int) -> None:
    scores, lengths = scores_of(kind, 2, 9000, seed=7), [9000, 5001]
    check(scores, lengths, 500, cluster=cluster, num_bits=4096, wide=True)


@pytest.mark.parametrize("ties", [63, 64, 65, 66, 129, 2000])
@pytest.mark.parametrize("cluster", [HELD, 1, 2])
def test_ties_around_what_is_ranked_directly(cluster: int, ties: int) -> None:
    width = 500 if cluster == HELD else 4000
    ties = min(ties, width - 8)
    scores = np.full((1, width), -1, np.float32)
    places = np.random.default_rng(ties).permutation(width)
    scores[0, places[:ties]], scores[0, places[ties : ties + 3]] = 0.5, 2
    for k in (1, 3, 4, ties // 2 + 3, ties + 2, ties + 3, ties + 4):
        check(scores, [width], k, cluster=cluster)


@pytest.mark.parametrize("width", [4096, 4097, 4101, 5000, 8189])
@pytest.mark.parametrize("k", [1, 2, 8, 100])
def test_the_first_of_many_equal_scores_in_registers(width: int, k: int) -> None:
    check(np.zeros((1, width), np.float32), [width], k, cluster=HELD, wide=True)


@pytest.mark.parametrize("width", [20_000, 20_010, 20_030])
def test_the_first_of_many_equal_scores_in_a_list(width: int) -> None:
    rng = np.random.default_rng(width)
    scores = rng.standard_normal((1, width)).astype(np.float32) / 10
    places = 12 + rng.permutation(width - 12)
    # so few that the bound is below them, and more than are ranked one by one
    scores[0, :12] = scores[0, places[:88]] = 2
    scores[0, places[88:583]] = 3 + rng.random(495)
    for k in (496, 497, 504, 510):
        check(scores, [width], k, wide=True, num_bits=32768)


@pytest.mark.parametrize("length", [1020, 1021, 1022, 1023, 1024, 1025, 2047, 2049])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_around_a_tile_and_a_window(length: int, offset: int) -> None:
    scores = scores_of("few values", 1, length, seed=length)
    for cluster in (1, 2):
        check(scores, [length], 40, cluster=cluster, offset=offset)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("cluster", [1, 4])
def test_short_rows_where_longer_ones_are_allowed(cluster: int, offset: int) -> None:
    scores = scores_of("few values", 8, 3000, seed=offset)
    lengths = [40, 41, 507, 508, 509, 512, 513, 3000]
    check(scores, lengths, 40, cluster=cluster, wide=True, gap=offset, offset=offset)


@pytest.mark.parametrize("k", [1, 2048, 5000, 100_000])
@pytest.mark.parametrize("width", [8193, 65536, 1 << 20, 1 << 24, (1 << 31) - 1])
@pytest.mark.parametrize("num_rows", [1, 3, 64, 132, 133, 4096])
def test_the_launcher_asks_for_what_a_gpu_has(num_rows: int, width: int, k: int) -> None:
    if k >= width:
        pytest.skip("rows of which everything is chosen have no list")
    found = (ctypes.c_int * 5)()
    rows = TopkRows(num_rows=num_rows, width=width, k=k)
    library().topk_sizes(ctypes.byref(rows), 132, found)
    cluster, capacity, num_bits, num_chosen, num_bytes = found
    assert 0 < num_bytes <= SHARED_BYTES and num_bits % 128 == 0 and num_bits > 0
    assert cluster in (1, 2, 4, 8, 16) and (cluster == 1 or num_rows * cluster <= 132)
    # a list is no use without room for what is chosen of it
    assert capacity >= 1024 and num_chosen == (k if k <= capacity else 0)
    assert k > 5000 or width > 1 << 20 or num_chosen == k


@pytest.mark.parametrize("kind", ["normal", "ascending", "descending", "recent"])
@pytest.mark.parametrize("num_rows", [64, 132])
def test_one_pass_over_long_rows_in_any_order(kind: str, num_rows: int) -> None:
    width, k = 32 << 10, 2048
    scores, out = scores_of(kind, 1, width, seed=1), np.full((1, k), POISON, np.int32)
    memory = np.empty(width + 4, np.float32)
    start = -memory.ctypes.data // 4 % 4
    logits, lengths = memory[start : start + width].reshape(1, width), np.array([width], np.int32)
    logits[:] = scores
    rows, num_bytes = rows_of(logits, lengths, out, width, width), ctypes.c_uint64()
    # blocks as a GPU has them for so many rows
    code = library().topk_emulated_among(ctypes.byref(rows), num_rows, ctypes.byref(num_bytes))
    assert code == 0
    np.testing.assert_array_equal(out, best(scores, [width], k))
    # the samples of each block, the row, and what is above the bound once more
    assert num_bytes.value < 1.5 * 4 * width
