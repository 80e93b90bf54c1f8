"""FlashMLA and DeepGEMM in the place of our kernels: doubles of both, on interpreted memory."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the doubles compute on Paddle's tensors")

from tests.attention.third_party.kernel_case import BOTH, Install, KernelCase, launches, serving
from tests.kernel_memory import KernelMemory, open_memory

pytestmark = pytest.mark.triton

# a first chunk below the selection of 64, decode with drafts and an idle row between chunks of
# prompts behind a prefix
MIXED = [(2, 0, 2), (0, 140, 1), (3, 90, 3), (0, 0, 0), (0, 70, 2), (4, 66, 4)]
DECODE = [(0, 140, 1), (0, 0, 0), (0, 70, 2), (0, 20, 1)]
LONG = [(33, 90, 33), (0, 100, 1)]


@cache
def ours(rows: tuple[Any, ...], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What our kernels give for a step; interpreted, they take seconds."""
    return KernelCase(open_memory("interpreter"), list(rows), **options).ours().run()


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether outputs agree within the rounding of bfloat16."""
    return bool(np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("flash_mla", "deep_gemm"),
    [("2025", "2025"), ("2026", "bundled"), ("2026", "2026"), ("2026", "2026_fp4")],
)
@pytest.mark.parametrize("rows", [MIXED, DECODE], ids=["mixed", "decode"])
def test_results_are_those_of_our_kernels(
    memory: KernelMemory, doubles: Install, rows: list[Any], flash_mla: str, deep_gemm: str
) -> None:
    wanted_slots, wanted = ours(tuple(rows))
    doubles(flash_mla, deep_gemm)
    case = KernelCase(memory, rows).begin()
    assert serving() == BOTH
    slots, out = case.run()
    np.testing.assert_array_equal(slots, wanted_slots)
    assert same(out, wanted)
    assert (out[-2:] == 0).all()
    has_prompt = any(row[0] for row in rows)
    gathered = launches("mqa_logits") - launches("paged_mqa_logits")
    # one in the probe; a release without relative scores gives none
    assert gathered == (deep_gemm != "2025") * (1 + has_prompt)


def test_a_schedule_serves_all_layers(memory: KernelMemory, doubles: Install) -> None:
    doubles()
    case = KernelCase(memory, DECODE, layers=2).begin()
    before = launches("metadata"), launches("flash_mla_schedule")
    for _ in range(2):
        case.begin()
        for layer in (0, 1, 0, 1):
            case.run(layer)
    # one of DeepGEMM's a step, as lengths grow; FlashMLA's depends on the shape alone
    assert launches("metadata") == before[0] + 2
    assert launches("flash_mla_schedule") == before[1] + 1


def test_schedules_of_all_sizes_are_compiled_before_a_step(
    memory: KernelMemory, doubles: Install
) -> None:
    doubles()
    import deep_gemm

    sizes, make = [], deep_gemm.get_paged_mqa_logits_metadata

    def recording(lengths: Any, *more: Any) -> Any:
        sizes.append(lengths.shape[0])
        return make(lengths, *more)

    deep_gemm.get_paged_mqa_logits_metadata = recording
    case = KernelCase(memory, DECODE, config={"max_num_tokens": 2100})
    case.attention._third_party.try_packages()
    assert set(sizes) - {1} == {32, 64, 128, 256, 512, 1024, 2048, 3072}
    del sizes[:]
    # one of them, however many tokens there are: 5 and 2 of padding
    case.begin()
    assert sizes == [32]


def test_long_steps_in_chunks(memory: KernelMemory, doubles: Install) -> None:
    doubles()
    slots = KernelCase(memory, LONG).begin().select()
    case = KernelCase(memory, LONG, logits_bytes=1).begin()
    flash = case.attention._third_party.attention
    assert flash is not None
    whole = case.attend(slots)
    flash.max_rows = 10
    before = launches("paged_mqa_logits"), launches("flash_mla_with_kvcache")
    found, out = case.run()
    np.testing.assert_array_equal(found, memory.get(slots))
    np.testing.assert_array_equal(out, whole)
    # 36 tokens: chunks of 32 scores, of 10 queries
    assert launches("paged_mqa_logits") == before[0] + 2
    assert launches("flash_mla_with_kvcache") == before[1] + 4


def test_prompts_without_room_are_scored_in_their_pages(
    memory: KernelMemory, doubles: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles()
    # 256 keys: the first prompts fit, the last (66 + 4 behind 2 + 1 + 93 + 2) with them, twice not
    monkeypatch.setattr("fd_dsa.attention.device_logits._GATHERED_BYTES", 132 * 256)
    rows = [*MIXED, (2, 150, 2)]
    theirs = KernelCase(memory, rows).begin()
    scores = theirs.attention._third_party.scores
    assert scores is not None
    wanted = memory.get(KernelCase(memory, rows).ours().select())
    np.testing.assert_array_equal(memory.get(theirs.select()), wanted)
    flags = memory.get(scores._rows.is_gathered)[: sum(row[2] for row in rows)]
    assert flags.tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]


def test_a_package_is_imported_by_the_first_step_that_is_not_captured(
    memory: KernelMemory, doubles: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles()
    case = KernelCase(memory, DECODE).ours()
    ours = case.select()
    kernels = case.attention._third_party
    monkeypatch.setattr(kernels._transfers, "is_capturing", lambda: True)
    case.begin()
    assert "deep_gemm" not in sys.modules and "flash_mla" not in sys.modules
    assert serving() == {}
    monkeypatch.setattr(kernels._transfers, "is_capturing", lambda: False)
    case.begin()
    assert serving() == BOTH
    np.testing.assert_array_equal(memory.get(case.select()), memory.get(ours))


def test_a_captured_graph_finds_the_rows_of_every_later_step(
    memory: KernelMemory, doubles: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles()
    case = KernelCase(memory, DECODE).begin()
    kernels = case.attention._third_party
    monkeypatch.setattr(kernels._transfers, "is_capturing", lambda: True)
    case.select()
    monkeypatch.setattr(kernels._transfers, "is_capturing", lambda: False)
    scores = kernels.scores
    assert scores is not None
    lengths = scores._rows.lengths
    assert memory.get(lengths)[:8].tolist() == [141, 71, 72, 21, 1, 1, 1, 1]
    # a shorter step, of rows that need no scores, and even without the package for new ones
    later = KernelCase(memory, [(0, 11, 1), (0, 30, 1)])
    kernels.drop("indexer_logits", RuntimeError("anything"))
    case.attention.begin_step(later.step)
    assert memory.get(lengths)[:8].tolist() == [12, 31, 1, 1, 1, 1, 1, 1]
    assert memory.get(lengths).max() == 31


def test_a_step_leaves_no_rows_to_a_shorter_one(memory: KernelMemory, doubles: Install) -> None:
    doubles()
    case = KernelCase(memory, LONG).begin()
    scores = case.attention._third_party.scores
    assert scores is not None
    lengths = memory.get(scores._rows.lengths)
    # prompts have their keys gathered, the row behind them has 101 in its pages
    assert lengths.tolist() == [1] * 33 + [101] + [1] * 30
    case.attention.begin_step(KernelCase(memory, [(0, 100, 1)]).step)
    assert memory.get(scores._rows.lengths).tolist() == [101] + [1] * 63


def test_long_captures_are_left_to_our_kernel(
    memory: KernelMemory, doubles: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles()
    case = KernelCase(memory, LONG, logits_bytes=1).begin()
    kernels, given = case.attention._third_party, case.layers[0]
    inputs = case.step, given.index_q, given.weights, given.keys
    slots = memory.poisoned((36, 64), "int32")
    monkeypatch.setattr(kernels._transfers, "is_capturing", lambda: True)
    # their chunks would depend on the longest row of the step
    assert not kernels.select(*inputs, slots)
    monkeypatch.setattr(kernels._transfers, "is_capturing", lambda: False)
    assert kernels.select(*inputs, slots)


def test_a_schedule_that_a_graph_holds_is_kept() -> None:
    from fd_dsa.ops.sparse_mla.flash_mla import _Schedules

    capturing, made = [False], iter(range(100))
    schedules = _Schedules(lambda: capturing[0])

    def take(rows: int) -> int:
        return schedules.take((rows, 64), lambda: next(made))

    assert [take(1), take(1), take(2)] == [0, 0, 1]
    capturing[0] = True
    assert [take(1), take(1)] == [0, 0]
    # no warm-up: what is made inside one graph has no values outside of it
    assert [take(9), take(9)] == [2, 3]
    capturing[0] = False
    assert take(9) == 4
    for rows in range(10, 40):
        take(rows)
    assert take(1) == 0
    assert take(2) == 35
