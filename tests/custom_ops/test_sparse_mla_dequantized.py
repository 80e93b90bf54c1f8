"""Sparse MLA over records that were dequantized before: the same bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.ops.mla.custom_op import NarrowAttention, WideAttention
from fd_dsa.ops.mla.records import Dequantized, DequantizedRecords, keys_per_token
from tests.custom_ops.mla import InTwo, assert_same_bits, run
from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import RANK, SCALE, Case, make
from tests.ops.test_dequantize import expected

KERNELS = "sparse_mla"
FP8, BLOCK = "fp8_ds_mla", 64
WORDS = 1 << 21


class Prompts:
    """A case whose records are elsewhere, too: those of the rows that are named.

    Args:
        case: over records; each token is a row of its own.
        rows: that were dequantized.
    """

    def __init__(self, case: Case, rows: list[int]) -> None:
        num_blocks, num_tokens = len(case.latents) // BLOCK, len(case.slots)
        self.blocks = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
        self.values = np.empty((num_blocks, BLOCK, RANK + 64), np.uint16)
        self.values[self.blocks] = expected(case.cache).reshape(self.values.shape)
        self.flags = np.isin(np.arange(num_tokens), rows).astype(np.int32)
        self.ids = np.arange(num_tokens, dtype=np.int32)

    def put(self, m: KernelMemory) -> Dequantized:
        """Arguments of the kernel."""
        arrays = m.put(self.values.view(np.int16)), m.put(self.blocks), m.put(self.flags)
        return Dequantized(*arrays, m.put(self.ids), BLOCK, len(self.blocks) * BLOCK)


@pytest.mark.parametrize(("heads", "splits"), [(64, 1), (70, 1), (40, 3)])
def test_what_was_dequantized_gives_the_same_bits(
    kernel_memory: KernelMemory, heads: int, splits: int
) -> None:
    m, case = kernel_memory, make(FP8, [130, 65, 0], 140, heads=heads, num_slots=256)
    given = Prompts(case, [0, 2]).put(m)
    result = run(m, WideAttention, case, splits=splits, dequantized=given)
    case.check(*result)
    assert_same_bits(result, run(m, WideAttention, case, splits=splits))


def test_records_are_read_of_tokens_without_a_dequantized_row(kernel_memory: KernelMemory) -> None:
    case = make(FP8, [70, 70, 70, 70], 70, heads=64, num_slots=256)
    prompts = Prompts(case, [0, 1, 2, 3])
    # no row at all, and flags of another one
    prompts.ids[:2], prompts.flags[2] = [-1, 4], 0
    prompts.values[...] = 0
    given = prompts.put(kernel_memory)
    out, lse = run(kernel_memory, WideAttention, case, splits=1, dequantized=given)
    assert not out[3].any()
    case.slots, case.q = case.slots[:3], case.q[:3]
    case.check(out[:3], lse[:3])


def test_places_that_are_none_are_skipped(kernel_memory: KernelMemory) -> None:
    case = make(FP8, [90], 90, heads=64, num_slots=256)
    prompts, lost = Prompts(case, [0]), [1, 3]
    prompts.blocks[lost] = [-1, len(prompts.blocks)]
    given = prompts.put(kernel_memory)
    result = run(kernel_memory, WideAttention, case, splits=1, dequantized=given)
    case.slots[np.isin(case.slots // BLOCK, lost)] = -1
    case.check(*result)


def test_a_second_launch_knows_the_rows_of_its_tokens(emulated_memory: KernelMemory) -> None:
    case = make(FP8, [30, 40], 40, heads=64, num_slots=256)
    given = Prompts(case, [1]).put(emulated_memory)
    # whose records are not read any more
    kept = case.cache.copy()
    case.cache[case.slots[1]] = 0xFF
    kernels = InTwo(1, 1, 1)
    out, lse = run(emulated_memory, WideAttention, case, kernels=kernels, dequantized=given)
    case.cache, case.slots, case.q = kept, case.slots[1:], case.q[1:]
    case.check(out[1:], lse[1:])


# ---- steps, whose records our own kernel dequantizes


class Step:
    """A step of prefill and decode rows, whose tokens name slots of their own rows.

    Args:
        rows: prefill tokens, tokens before, and tokens of the step of each row.
        topk: entries of a token; some are none, at any place.
    """

    def __init__(
        self, m: KernelMemory, rows: list[tuple[int, int, int]], heads: int, topk: int = 150
    ) -> None:
        rng = np.random.default_rng(heads)
        keys = [before + new for _, before, new in rows]
        counts = [-(-n // BLOCK) for n in keys]
        num_blocks, num_tokens = sum(counts) + 2, sum(new for _, _, new in rows)
        case = make(FP8, [1] * num_tokens, topk, heads=heads, num_slots=num_blocks * BLOCK)
        tables = np.full((len(rows), max(counts) + 1), -1, np.int32)
        free = rng.permutation(num_blocks).astype(np.int32)
        token = 0
        for row, (_, _, new) in enumerate(rows):
            tables[row, : counts[row]], free = free[: counts[row]], free[counts[row] :]
            positions = np.arange(keys[row])
            slots = tables[row, positions // BLOCK] * BLOCK + positions % BLOCK
            chosen = rng.choice(slots, (new, topk))
            case.slots[token : token + new] = np.where(rng.random(chosen.shape) < 0.1, -1, chosen)
            token += new
        self.memory, self.case, self.rows = m, self._named(case), rows
        self.cache = m.put(case.cache.reshape(num_blocks, 1, BLOCK, -1))
        encoder, decoder, this_time = (np.array(x, np.int32) for x in zip(*rows, strict=True))
        self.meta: Any = SimpleNamespace(
            block_tables=m.put(tables),
            seq_lens_encoder=m.put(encoder),
            seq_lens_decoder=m.put(decoder),
            seq_lens_this_time=m.put(this_time),
            batch_id_per_token=m.put(np.repeat(np.arange(len(rows), dtype=np.int32), this_time)),
            num_prefill_tokens=int(encoder.sum()),
        )

    @staticmethod
    def _named(case: Case) -> Case:
        """Without the NaN of slots that were not to be named."""
        nans = (case.cache[:, :RANK] == 0xFF).all(axis=1)
        case.cache[nans] = case.cache[np.flatnonzero(~nans)[0]]
        case.latents[nans] = case.latents[np.flatnonzero(~nans)[0]]
        return case

    def dequantized(self, words: int = WORDS, keys_per_token: int = 1 << 20) -> Any:
        """Records of the prompts in memory that held something else."""
        memory = self.memory.poisoned((words,), "float32")
        return DequantizedRecords(memory, keys_per_token).fill(self.cache, self.meta)

    def run(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the result of the kernel in poisoned memory."""
        m, case = self.memory, self.case
        num_tokens, num_heads, _ = case.q.shape
        out = m.poisoned((num_tokens, num_heads, RANK), "float32")
        lse = m.poisoned((num_tokens, num_heads), "float32")
        q, _, slots = case.inputs(m)
        attend = WideAttention(custom_ops.build().kernels)
        attend(q, self.cache, slots, out, softmax_scale=case.scale, lse=lse, **options)
        return m.get(out), m.get(lse)

    def check(self, dequantized: Any, splits: int = 0) -> None:
        """Near attention in doubles, and the bits of the kernel that reads records."""
        result = self.run(dequantized=dequantized, splits=splits)
        self.case.check(*result)
        assert_same_bits(result, self.run(splits=splits))


MIXED = [(7, 300, 7), (0, 129, 1), (0, 0, 0), (33, 0, 33), (0, 64, 4), (5, 59, 5)]


@pytest.mark.parametrize(("heads", "splits"), [(64, 0), (64, 1), (100, 2), (128, 0), (40, 16)])
def test_the_bits_are_those_over_records(gpu_memory: KernelMemory, heads: int, splits: int) -> None:
    step = Step(gpu_memory, MIXED, heads)
    given = step.dequantized()
    assert gpu_memory.get(given.is_dequantized).view(np.int32).tolist() == [1, 0, 0, 1, 0, 1]
    step.check(given, splits)


@pytest.mark.parametrize(("blocks", "wanted"), [(1, [0, 1]), (6, [1, 0]), (7, [1, 1])])
def test_rows_that_were_not_dequantized_are_read_as_records(
    gpu_memory: KernelMemory, blocks: int, wanted: list[int]
) -> None:
    step = Step(gpu_memory, [(20, 330, 20), (9, 55, 9)], 64)
    given = step.dequantized(32 + blocks * BLOCK * 288)
    assert gpu_memory.get(given.is_dequantized).view(np.int32).tolist() == wanted
    step.check(given)


def test_records_of_a_prompt_are_what_is_read(gpu_memory: KernelMemory) -> None:
    step = Step(gpu_memory, [(9, 55, 9), (0, 100, 1)], 64)
    given = step.dequantized()
    wanted = step.run()
    step.cache[...] = 0
    found = step.run(dequantized=given)
    np.testing.assert_array_equal(found[0][:9], wanted[0][:9])
    assert not found[0][9:].any() and wanted[0][9:].any()


def test_slots_that_are_not_of_the_row_write_nothing_wrong(gpu_memory: KernelMemory) -> None:
    step = Step(gpu_memory, [(9, 55, 9), (4, 60, 4)], 64)
    given = step.dequantized()
    slots = step.case.slots
    slots[0, ::2], slots[1], slots[2, 5:] = -5, -1, 2**31 - 1
    step.check(given)
    # blocks that no row has: memory that held something else says where they are
    spare = np.setdiff1d(np.arange(step.cache.shape[0] * BLOCK), slots)
    slots[3] = np.resize(spare, slots.shape[1])
    found, _ = step.run(dequantized=given)
    wanted, _ = step.run()
    kept = np.delete(np.arange(len(slots)), 3)
    np.testing.assert_array_equal(found[kept], wanted[kept])


def attention_of(m: KernelMemory, heads: int, kind: Any, words: int) -> Any:
    """Attention by a kernel of custom_ops/, with memory for records, float32 [words]."""
    from fd_dsa.ops.mla.tensor_core import TensorCoreAttention

    records = DequantizedRecords(m.poisoned((words,), "float32"), keys_per_token(heads), 4)
    custom = kind(custom_ops.build().kernels)
    return TensorCoreAttention(heads, SCALE, m.poisoned, custom, records=records)


@pytest.mark.parametrize(
    ("rows", "serves"), [([(256, 90, 256), (0, 30, 1)], True), ([(255, 90, 255)], False)]
)
def test_prompts_of_many_tokens_take_it(
    gpu_memory: KernelMemory,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[int, int, int]],
    serves: bool,
) -> None:
    m, step, seen = gpu_memory, Step(gpu_memory, rows, 64), []
    original = WideAttention.__call__

    def recording(self: Any, *arguments: Any, **options: Any) -> None:
        seen.append(options["dequantized"])
        original(self, *arguments, **options)

    attention = attention_of(m, 64, WideAttention, WORDS)
    monkeypatch.setattr(WideAttention, "__call__", recording)
    out = m.poisoned((len(step.case.q), 64, RANK), "float32")
    lse = m.poisoned((len(step.case.q), 64), "float32")
    q, _, slots = step.case.inputs(m)
    attention.attend(q, step.cache, slots, out, lse, step.meta)
    step.case.check(m.get(out), m.get(lse))
    assert [found is not None for found in seen] == [serves]


@pytest.mark.parametrize(
    ("kind", "heads", "cache"), [(NarrowAttention, 16, FP8), (WideAttention, 64, "bfloat16")]
)
def test_no_other_kernel_takes_them(
    gpu_memory: KernelMemory, kind: Any, heads: int, cache: str
) -> None:
    m = gpu_memory
    attention = attention_of(m, heads, kind, 9)
    counts = [30] * 150
    case = make("fp8_ds_mla" if cache == FP8 else "bfloat16", counts, 30, heads=heads)
    out, lse = m.poisoned((150, heads, RANK), "float32"), m.poisoned((150, heads), "float32")
    # nothing of the step is looked at but its number of prefill tokens
    attention.attend(*case.inputs(m), out, lse, SimpleNamespace(num_prefill_tokens=256))
    case.check(m.get(out), m.get(lse))
