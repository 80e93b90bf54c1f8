"""Prompt tokens see the keys of their windows: selection and attention, on a CPU and a device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the CPU's products are Paddle's")

import paddle

import fd_dsa.ops as ops
from fd_dsa.errors import MissingStepError
from tests.attention.harness import FP8, Sizes, Step, World, world_of
from tests.attention.test_device import PADDING, ROWS, OnDevice
from tests.kernel_memory import KernelMemory
from tests.strategies import make_batch

# flat tokens of ROWS: 0 and 1 are a first chunk, 3 to 12 another one, 13 to 15 a later chunk
# after 23 keys. A window without the first key, one that is empty, later keys of the same chunk,
# windows in the middle, and bounds past both ends of the row's keys.
WINDOWS = {1: (1, 2), 5: (0, 0), 4: (0, 6), 12: (3, 10), 13: (2, 15), 14: (-9, 99), 15: (20, 26)}
# these are less than a selection of 8 keys, and more
ONE = {15: (20, 26)}, {15: (0, 20)}, {12: (0, 9)}


def world_and_step(sizes: Sizes, windows: dict[int, tuple[int, int]]) -> tuple[World, Step]:
    padded = PADDING + sum(new for _, _, new in ROWS)
    world = world_of(make_batch(ROWS, sizes.block_size, num_padded_tokens=padded), sizes)
    return world, world.run(ROWS, PADDING, windows)


@pytest.mark.parametrize("dtype", ["float32", FP8])
@pytest.mark.parametrize("topk", [1, 8, 30, 60])
def test_on_a_cpu(topk: int, dtype: str) -> None:
    sizes = Sizes(topk, 64 if dtype == FP8 else 16, dtype, layers=2)
    world, step = world_and_step(sizes, WINDOWS)
    world.check(ROWS, step, PADDING, windows=WINDOWS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", FP8])
@pytest.mark.parametrize("topk", [8, 60])
def test_on_a_device(kernel_memory: KernelMemory, topk: int, dtype: str) -> None:
    sizes = Sizes(topk, 64 if dtype == FP8 else 16, dtype)
    OnDevice(kernel_memory, sizes, ROWS, WINDOWS).check()


@pytest.mark.parametrize("windows", ONE)
def test_one_other_window_is_one_other_answer(
    kernel_memory: KernelMemory, windows: dict[int, tuple[int, int]]
) -> None:
    found = []
    for changed in ({}, windows):
        case = OnDevice(kernel_memory, Sizes(8), ROWS, changed)
        found.append((case.cpu.outputs[0], case.attend(case.select())))
    for plain, other in zip(*found, strict=True):
        differs = np.abs(plain - other).max(axis=(1, 2)) > 1e-3
        assert np.flatnonzero(differs).tolist() == [*windows]


@pytest.mark.parametrize("bound", [0, -77])
def test_without_windows_of_their_own_prompts_see_nothing(bound: int) -> None:
    sizes = Sizes(8)
    prompts = [0, 1, *range(3, 16)]
    world, plain = world_and_step(sizes, {})
    meta = world.begin(ROWS, PADDING)
    meta.indexer_attn_mask_offsets.fill_(bound)
    given = {n: world.packed(0, ROWS, PADDING, n) for n in ("q", "index_q", "weights")}
    slots = world.backend.select(given["index_q"], given["weights"], 0, meta)
    out = world.backend.attend(given["q"], slots, 0, meta).numpy()
    assert not out[prompts].any()
    # decode rows have no windows
    np.testing.assert_array_equal(out[[2, 16, 17, 18]], plain.outputs[0][[2, 16, 17, 18]])


@pytest.mark.parametrize("name", ["indexer_attn_mask_offsets", "cu_seqlens_kg"])
def test_a_step_with_prompts_needs_its_windows(kernel_memory: KernelMemory, name: str) -> None:
    case = OnDevice(kernel_memory, Sizes(8), ROWS)
    message = rf"ForwardMeta\.{name} is None.*15 prompt.*StepMetadataBuilder\.build.*first"
    setattr(case.step, name, None)
    with pytest.raises(MissingStepError, match=message):
        case.select()
    world = case.world
    meta = world.begin(ROWS, PADDING)
    step = world.backend.attention_metadata
    assert step is not None
    world.backend.attention_metadata = replace(step, **{name: None})
    given = [world.packed(0, ROWS, PADDING, n) for n in ("index_q", "weights")]
    with pytest.raises(MissingStepError, match=message):
        world.backend.select(*given, 0, meta)
    with pytest.raises(MissingStepError, match=message):
        ops.indexer_logits(*given, meta.caches[1], world.backend.attention_metadata)


def test_scores_of_the_operator_are_those_of_the_windows() -> None:
    sizes = Sizes(8)
    world, _ = world_and_step(sizes, WINDOWS)
    step = world.backend.attention_metadata
    assert step is not None
    given = [world.packed(0, ROWS, PADDING, n) for n in ("index_q", "weights")]
    out = paddle.full([step.position_ids.shape[0], step.max_seqlen_k], 7e7)
    seen = ops.indexer_logits(*given, world.caches[1], step, out).numpy() != np.float32(7e7)
    assert seen[15].tolist() == [20 <= key < 26 for key in range(41)]
    assert seen[14].tolist() == [key < 26 for key in range(41)]
    assert not seen[5].any() and seen[2].all()
