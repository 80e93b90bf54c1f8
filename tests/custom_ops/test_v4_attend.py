"""Attention of DeepSeek-V4 by the kernel of custom_ops/, against sums in float64.

On a GPU, in Paddle's memory, and on the CPU with emulated threads; see test_sparse_mla_kernel.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.errors import DeviceError, LaunchError, ShapeError
from fd_dsa.ops import v4_attend, v4_attend_cuda
from fd_dsa.ops.dense_kernels import empty_fp8_rows, quantize_rows
from fd_dsa.ops.v4_attend import new_partials, num_programs
from fd_dsa.ops.v4_attend_cuda import suits
from fd_dsa.ops.v4_places import Entries, TokenPlaces, Windows
from fd_dsa.ops.v4_plain import PlainRows, PlainSizes
from fd_dsa.tensor import Fp8Rows
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8, v4_records
from tests.ops.test_v4_kernels import EPS, drawn, normed, rotated, with_sinks

KERNELS = "v4_attend"
WIDTH, ROPE, LONGEST = 512, 64, 600
ANGLES = np.arange(LONGEST)[:, None] * 0.9 ** np.arange(ROPE // 2)
COS_SIN = np.concatenate((np.cos(ANGLES), np.sin(ANGLES)), axis=1).astype(np.float32)


@pytest.fixture
def memory(hopper_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch) -> KernelMemory:
    """The memory of the kernel, which serves however few tokens there are.

    An emulated GPU has two multiprocessors, so that a block attends for several tokens.
    """
    monkeypatch.setattr(v4_attend_cuda, "FEW_PROGRAMS", 0)
    monkeypatch.setenv("FD_DSA_EMULATED_SMS", "2")
    return hopper_memory


@dataclass
class Form:
    """Keys and entries that a layer attends to.

    Attributes:
        ratio, per_block: tokens of an entry, entries of a block; ratio 0 = a window alone.
        topk: selected entries, 0 = all entries.
        is_fp8: True if keys and entries are records.
    """

    heads: int
    ratio: int = 0
    per_block: int = 1
    topk: int = 0
    window: int = 40
    ring_rows: int = 43
    is_fp8: bool = False


FORMS = {
    "window": Form(20),
    "all entries": Form(64, ratio=8, per_block=2),
    "selected": Form(70, ratio=2, per_block=16, topk=72),
}
FORMS |= {f"{name}, records": replace(form, is_fp8=True) for name, form in FORMS.items()}
# tokens of each row before the step and in it
STEPS = ([0, 3], [2, 1]), ([400, 0, 39], [1, 3, 2])


class Step:
    """A step with padding, in a memory and in float64."""

    def __init__(self, m: KernelMemory, form: Form, before: list[int], new: list[int]) -> None:
        rng, self.form = np.random.default_rng(sum(before)), form
        self.rows = np.repeat(np.arange(len(new)), new)
        self.positions = np.concatenate(list(map(np.arange, before, np.add(before, new))))
        self.before, self.new = before, new
        self.starts = np.concatenate(([0], np.cumsum(new)))
        padding = np.full(1, -1)
        tokens = len(self.rows) + 1
        # columns of wider rows
        both, exact = drawn(m, "bfloat16", tokens, form.heads * WIDTH + 64)
        self.q, self.exact_q = both[:, : form.heads * WIDTH], exact[:, : form.heads * WIDTH]
        keys, self.keys = self._held(m, rng, tokens)
        unused = np.ones((len(new), form.ring_rows), bool)
        for row, kept in enumerate(before):
            unused[row, np.arange(max(kept - form.window, 0), kept) % form.ring_rows] = False
        ring, self.ring = self._held(m, rng, unused.size, unused.ravel())
        self.windows = Windows(keys, ring, form.ring_rows, form.window)
        self.entries, columns = None, 1
        if form.ratio:
            columns = max(before) // (form.ratio * form.per_block) + 2
            blocks = len(new) * columns + 1
            pool, self.pool = self._held(m, rng, blocks * form.per_block)
            pool = pool.reshape([blocks, form.per_block, -1])
        self.table = rng.permutation(len(new) * columns).reshape(len(new), columns)
        self.slots = np.full((tokens, form.topk), -1)
        if form.topk:
            for token, (row, position) in enumerate(zip(self.rows, self.positions, strict=True)):
                visible = (position + 1) // form.ratio
                chosen = np.sort(rng.permutation(visible)[: form.topk])
                found = self.slots_of(row, chosen)
                # a missing entry among others
                self.slots[token, : len(found)] = np.where(rng.random(len(found)) < 0.1, -1, found)
        if form.ratio:
            slots = m.put(self.slots.astype(np.int32)) if form.topk else None
            self.entries = Entries(pool, form.ratio, slots)
        ids = np.concatenate((self.positions, padding)), np.concatenate((self.rows, padding))
        made = (m.put(x.astype(np.int32)) for x in (*ids, self.starts, self.table))
        self.places = TokenPlaces(*made)
        self.rest = self.places, EPS, new_partials(WIDTH, m.poisoned)
        self.sinks = rng.standard_normal(form.heads).astype(np.float32)
        self.given = self.q, self.windows, self.entries, m.put(self.sinks), m.put(COS_SIN)

    def _held(
        self, m: KernelMemory, rng: np.random.Generator, count: int, unused: Any = ()
    ) -> tuple[Any, np.ndarray]:
        """Random keys as a layer holds them, and in float64. Unused ones are NaN or wrong bytes."""
        values = block_fp8.rounded(rng.standard_normal((count, WIDTH)), "bfloat16")
        if not self.form.is_fp8:
            values[np.flatnonzero(unused)] = np.nan
            return block_fp8.put(m, values, "bfloat16"), values.astype(np.float64)
        records = v4_records.records(values, ROPE)
        exact = v4_records.values(records, ROPE)
        records[np.flatnonzero(unused)] = 0xFF
        return m.put(records), exact

    def slots_of(self, row: int, entries: np.ndarray) -> np.ndarray:
        per_block = self.form.per_block
        return np.asarray(self.table[row, entries // per_block] * per_block + entries % per_block)

    def wanted(self, token: int) -> np.ndarray:
        """The result of a token's heads in float64."""
        form, row, position = self.form, self.rows[token], self.positions[token]
        q = self.exact_q[token].reshape(form.heads, WIDTH)
        q = rotated(normed(q, 1.0), position, 1, ANGLES) * WIDTH**-0.5
        begin, keys = position - (token - self.starts[row]), []
        for place in range(max(position + 1 - form.window, 0), position + 1):
            own = place >= begin
            ring = self.ring[row * form.ring_rows + place % form.ring_rows]
            keys.append(self.keys[token - (position - place)] if own else ring)
        if form.ratio:
            slots = self.slots_of(row, np.arange((position + 1) // form.ratio))
            if form.topk:
                slots = self.slots[token][self.slots[token] >= 0]
            keys += list(self.pool[slots])
        attended = with_sinks(q, np.array(keys, np.float64), self.sinks)
        return rotated(attended, position, -1, ANGLES).ravel()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_every_token_meets_its_keys(memory: KernelMemory, step: int, name: str) -> None:
    check(memory, FORMS[name], STEPS[step])


def check(m: KernelMemory, form: Form, step: tuple[list[int], list[int]]) -> None:
    """Assert the results of a step's tokens."""
    case = Step(m, form, *step)
    found = block_fp8.get(m, v4_attend.attend_v4(*case.given, *case.rest))
    for token in range(len(case.rows)):
        wanted = case.wanted(token)
        error = np.abs(found[token] - wanted).max() / np.abs(wanted).max()
        assert error < 2.0**-7, (token, error)
    # padding has no keys
    assert (found[-1] == 0).all()


def test_codes_are_those_of_the_values(memory: KernelMemory) -> None:
    m, case = memory, Step(memory, FORMS["selected"], *STEPS[1])
    plain = v4_attend.attend_v4(*case.given, *case.rest)
    found = v4_attend.attend_v4(*case.given, *case.rest, round_scales=True)
    assert isinstance(found, Fp8Rows)
    wanted, tokens = quantize_rows(plain, True), len(case.rows)
    np.testing.assert_array_equal(m.get(found.codes)[:tokens], m.get(wanted.codes)[:tokens])
    scales = m.get(found.scales)[:, :tokens], m.get(wanted.scales)[:, :tokens]
    np.testing.assert_array_equal(*scales)
    again = v4_attend.attend_v4(*case.given, *case.rest, round_scales=True)
    assert isinstance(again, Fp8Rows)
    np.testing.assert_array_equal(m.get(found.codes), m.get(again.codes))


@pytest.mark.parametrize("name", [name for name in FORMS if FORMS[name].is_fp8])
def test_plain_rows_read_values(memory: KernelMemory, name: str) -> None:
    """They have the bits of records, which are wrong by now. Other rows read records."""
    m, form, case = memory, FORMS[name], Step(memory, FORMS[name], *STEPS[1])
    wanted = m.get(v4_attend.attend_v4(*case.given, *case.rest))
    rows, columns = case.table.shape
    tokens, ratio = len(case.rows) + 1, form.ratio or LONGEST
    block = form.per_block * ratio
    sizes = PlainSizes(
        tokens, rows, columns, 0, form.window, form.ring_rows, block, ratio, WIDTH, ROPE
    )
    # no more memory than the plain rows need
    needed = sum(
        -(-(case.before[row] + case.new[row]) // ratio // form.per_block) for row in (1, 2)
    )
    words = (sizes.first_entry + max(needed, 1) * form.per_block) * WIDTH // 2
    plain = PlainRows(sizes, m.poisoned((words,), "float32"), m.poisoned)
    counts = (m.put(np.array(x, np.int32)) for x in (case.before, case.new))
    places = plain.place(*counts, case.places.block_table, rows * columns)
    is_plain = m.get(places.is_plain) > 0
    assert is_plain.tolist() == [False, True, True]
    _, windows, entries, *others = case.given
    values = plain.fill(windows, entries, case.places.rows, rows)
    tokens_of_plain, table = np.append(is_plain[case.rows], False), m.get(places.block_table)
    windows = windows._replace(
        keys=spoiled(m, windows.keys, tokens_of_plain),
        ring=spoiled(m, windows.ring, np.repeat(is_plain, form.ring_rows)),
    )
    if entries is not None:
        pool = spoiled(
            m, entries.pool, np.isin(np.arange(rows * columns + 1), case.table[is_plain])
        )
        slots = case.slots.copy()
        for token, row in enumerate(case.rows):
            if is_plain[row]:
                numbers = dict(zip(case.table[row], table[row], strict=True))
                found = [
                    numbers[slot // form.per_block] * form.per_block + slot % form.per_block
                    for slot in slots[token][slots[token] >= 0]
                ]
                slots[token][slots[token] >= 0] = found
        entries = entries._replace(pool=pool, slots=m.put(slots.astype(np.int32)))
        entries = entries if form.topk else entries._replace(slots=None)
    given = case.q, windows, entries, *others, *case.rest
    found = m.get(v4_attend.attend_v4(*given, plain=values))
    np.testing.assert_array_equal(found, wanted)
    # the values of plain rows are read, and no others
    again = m.get(v4_attend.attend_v4(*given))
    differs = (again != wanted).any(axis=1)
    np.testing.assert_array_equal(differs, tokens_of_plain)


def spoiled(m: KernelMemory, records: Any, rows: np.ndarray) -> Any:
    """Records of which some have other bytes."""
    found = m.get(records)
    found[rows] ^= 0x11
    return m.put(found)


def test_values_without_the_kernel_are_refused(
    memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Step(memory, FORMS["window, records"], *STEPS[0])
    sizes = PlainSizes(4, 2, 1, 0, 40, 43, 8, 8, WIDTH, ROPE)
    plain = PlainRows(sizes, memory.poisoned((sizes.least_words,), "float32"), memory.poisoned)
    values = plain.fill(case.windows, None, case.places.rows, 0)
    monkeypatch.setattr(v4_attend_cuda, "FEW_PROGRAMS", 1 << 20)
    with pytest.raises(LaunchError, match="Triton's kernel reads no plain keys"):
        v4_attend.attend_v4(*case.given, *case.rest, plain=values)


def test_sizes_that_triton_serves() -> None:
    # the least number of tokens by the number of heads
    for heads, least in ((128, 5), (64, 9), (48, 9), (32, 17), (16, 33), (8, 33)):
        assert suits("bfloat16", num_programs(least, heads), 512, 64, True)
        assert not suits("bfloat16", num_programs(least - 1, heads), 512, 64, True)
    programs = num_programs(99, 64)
    assert suits("bfloat16", num_programs(8192, 64), 512, 64, None)
    refused = ("float32", programs, 512, 64, True), ("bfloat16", programs, 448, 64, True)
    refused += ("bfloat16", programs, 512, 32, True), ("bfloat16", programs, 512, 64, False)
    assert not any(suits(*sizes) for sizes in refused)


def test_unaligned_queries_are_refused(memory: KernelMemory) -> None:
    case = Step(memory, FORMS["window"], *STEPS[0])
    queries = memory.poisoned((len(case.rows) + 1, 20 * WIDTH + 1), "bfloat16")
    with pytest.raises(LaunchError, match="q is not aligned to 16 bytes"):
        v4_attend.attend_v4(queries[:, 1:], *case.given[1:], *case.rest)
    with pytest.raises(DeviceError, match="fd_dsa_v4_attend_cuda: CUDA error"):
        v4_attend.attend_v4(queries[:, :-1], *case.given[1:], *case.rest)


@pytest.mark.parametrize("name", ["selected", "selected, records"])
def test_rows_of_other_sizes_are_refused(memory: KernelMemory, name: str) -> None:
    case = Step(memory, FORMS[name], *STEPS[0])
    windows, entries = case.given[1:3]
    assert entries is not None
    wide = memory.poisoned((len(case.rows) + 1, 70 * WIDTH + 8), "bfloat16")
    for wrong in (
        (wide, windows, entries),
        (case.q, windows._replace(keys=windows.keys[:, 8:]), entries),
        (case.q, windows._replace(ring=windows.ring[:, 8:]), entries),
        (case.q, windows, entries._replace(pool=entries.pool[..., 8:])),
    ):
        with pytest.raises(ShapeError, match="fd_dsa_v4_attend_cuda: got rows of"):
            v4_attend.attend_v4(*wrong, *case.given[3:], *case.rest)


# fields that are valid otherwise
REFUSED: tuple[tuple[str, int | None], ...] = (
    ("ratio", 0), ("per_block", 0), ("window", 0), ("ring_rows", 38), ("plain_keys", 16),
    ("codes", None), ("scales", None), ("scale_stride", 6), ("pool", 8),
)  # fmt: skip


def test_what_the_launcher_refuses(memory: KernelMemory) -> None:
    case = Step(memory, FORMS["selected"], *STEPS[1])
    kernel = v4_attend_cuda.kernel_for(case.q)
    assert kernel is not None
    out = empty_fp8_rows(case.q, *case.q.shape)
    kernel(*case.given, case.places, EPS, out)
    for name, wrong in REFUSED:
        right = getattr(kernel.job, name)
        setattr(kernel.job, name, wrong)
        with pytest.raises(DeviceError):
            kernel.launch()
        setattr(kernel.job, name, right)
    kernel.launch()


KEYS = "v4_attend_keys.cuh"
FAULTS = {
    "no sink": ("v4_attend.cu", "(state.total[r] + share)", "state.total[r]"),
    "results keep the rotation": ("v4_attend.cu", "x * cos + y * sin, y", "x * cos - y * sin, y"),
    "queries without a norm": ("v4_attend.cu", "sqrtf(sum +", "sqrtf(512.0f +"),
    "a new key from the ring": (KEYS, "entry >= begin", "entry > begin"),
    "another row of the ring": (KEYS, "+ place % job.ring_rows", "+ (place + 1) % job.ring_rows"),
    "entries of a block are one": (KEYS, "offset = entry % job.per_block", "offset = 0"),
    "selected entries are others": (KEYS, "job.topk + entry, times", "job.topk, times"),
    "keys that are missing": (KEYS, "__ballot_sync(~0u, now.key != nullptr)", "0xffffu"),
    "powers of another group": (KEYS, "word >> lane / 8 * 8", "word >> (lane / 8 ^ 1) * 8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(
    assert_fault_shows: Callable[..., None], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(v4_attend_cuda, "FEW_PROGRAMS", 0)
    monkeypatch.setenv("FD_DSA_EMULATED_SMS", "2")
    assert_fault_shows(check_forms, *FAULTS[fault])


def check_forms(m: KernelMemory) -> None:
    """Assert the results of a step of each form."""
    for name in ("window", "all entries", "selected", "selected, records"):
        check(m, FORMS[name], STEPS[1])
