"""Prompts of DeepSeek-V4 over FP8 caches, whose records become rows of values first."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from custom_ops.build_library import build_library
from fd_dsa import custom_ops
from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.device.transfers import transfers_for
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.registry import read_config
from fd_dsa.ops import v4_attend, v4_attend_cuda, v4_plain
from fd_dsa.ops.v4_attend_cuda import V4AttendKernel
from fd_dsa.ops.v4_plain import PlainRows
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.v4_attention.device_backend import V4DeviceBackend
from fd_dsa.v4_attention.device_memory import workspace_bytes
from fd_dsa.v4_attention.device_pools import DeviceLayout
from tests.custom_ops.building import emulated_library
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_captured_prompts import captured, poison
from tests.gpu_rig.device.test_v4_captured import SMALL, Step, logits_of
from tests.gpu_rig.device.test_v4_model import device_model, device_runner, poison_pools
from tests.gpu_rig.device.test_v4_ranks import on_two_ranks
from tests.v4_model.cases import Case
from tests.v4_model.ours import run_step

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]

ROWS, LEAST = 4, 8
# the kernel's widths, and a selection from 16 tokens on
WIDTHS = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 64, "index_topk": 3}
CASE = Case("plain", SMALL | WIDTHS | {"hc_sinkhorn_iters": 1}, 51)
# steps, and the plain rows of each
STEPS: tuple[tuple[Step, list[int]], ...] = (
    ([(0, 0, 9)], [0]),
    # a chunk with a prefix, a new prompt, and padding if it is replayed
    ([(0, 9, 3), (1, 0, 10)], [0, 1]),
    # a token of an answer, and a prompt that goes on in the next block
    ([(0, 12), (1, 10, 12)], [1]),
    # a chunk that begins at the end of an entry; one new token is like one of an answer
    ([(0, 13, 7), (1, 22, 6), (2, 0, 17), (3, 0, 1)], [0, 1, 2]),
    # enough tokens only with the padding of a graph
    ([(0, 20), (1, 28, 2)], [1]),
)


@pytest.fixture
def kernel(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel of custom_ops/ attends in every step with prompts: on a CPU, emulated threads."""
    monkeypatch.setattr(v4_attend_cuda, "FEW_PROGRAMS", LEAST - 1)
    if rig.is_real:
        custom_ops.use_library(build_library())
    elif rig.form == "fake":
        made = V4AttendKernel(ctypes.CDLL(str(emulated_library("v4_attend"))))
        for module in (v4_attend, v4_plain):
            monkeypatch.setattr(module, "kernel_for", lambda tensor: made)
    else:
        pytest.skip("emulated threads follow device pointers")
    yield
    custom_ops.use_library(None)


def plain_rows(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the places of each step, or None for a step without them."""
    found, place = list[Any](), PlainRows.place

    def kept(self: PlainRows, *given: Any) -> Any:
        found.append(place(self, *given))
        return found[-1]

    monkeypatch.setattr(PlainRows, "place", kept)
    return found


def runner_of(rig: Rig, model: Any) -> ModelRunner:
    """A runner with FP8 caches."""
    own: dict[str, Any] = {"kv_cache_dtype": "fp8_ds_mla", "tokens": 32}
    return device_runner(model, rig, "bfloat16", CASE.block_size, ROWS, **own)


def poison_memory(runner: ModelRunner) -> None:
    """Replace values and places, which a step must not read before it writes them."""
    plain = runner.attn_backends[0]._plain
    for tensor in (plain._memory, *plain._places[:4]):
        poison(tensor)


@pytest.mark.parametrize("is_captured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_logits_have_the_bits_of_records(
    rig: Rig, kernel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_captured: bool
) -> None:
    """Steps of up to 16 tokens may be replayed, longer ones are eager."""
    model = device_model(CASE.write(tmp_path), rig, "bfloat16")
    places, found = plain_rows(monkeypatch), list[list[np.ndarray]]()
    for least in (1 << 20, LEAST):
        monkeypatch.setattr(v4_plain, "LEAST_TOKENS", least)
        runner = runner_of(rig, model)
        graphs = captured(rig, runner, (), (16,), capture_of(rig)) if is_captured else nullcontext()
        with graphs:
            poison_pools(runner)
            found.append([])
            for step, plain in STEPS:
                places.clear()
                if least == LEAST:
                    poison_memory(runner)
                found[-1].append(logits_of(runner, step))
                if places:
                    is_plain = places[-1].is_plain.numpy()
                    assert [row for row, *_ in step if is_plain[row]] == plain, step
                # a replay on a GPU calls no function
                if not is_captured:
                    assert bool(places) == (least == LEAST and step is not STEPS[-1][0])
            steps = runner.counters.graph_steps
            assert steps["prefill"] + steps["mixed"] == (4 if is_captured else 0)
    for (step, _), one, other in zip(STEPS, *found, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=str(step))


@pytest.mark.slow
def test_ranks_that_select_for_parts_of_a_step(
    rig: Rig, kernel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them has the values of all rows."""
    if rig.is_real:
        pytest.skip("its ranks are processes")
    monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", "1")
    folder, prompt = CASE.write(tmp_path), CASE.prompt(64)

    def logits(group: Any) -> list[np.ndarray]:
        model = device_model(folder, rig, "bfloat16", group=group)
        runner = runner_of(rig, model)
        steps = {0: (prompt[:32], 0)}, {0: (prompt[32:48], 32), 2: (prompt[:16], 0)}
        found = [array for step in steps for array in run_step(runner, step).values()]
        assert group.num_scattered
        return found

    found, places = [], plain_rows(monkeypatch)
    for least in (1 << 20, LEAST):
        monkeypatch.setattr(v4_plain, "LEAST_TOKENS", least)
        found += on_two_ranks(rig, logits)
    assert len(places) == 2 * 2
    for others in zip(*found, strict=True):
        for one in others[1:]:
            np.testing.assert_array_equal(one, others[0])


@pytest.mark.parametrize(
    ("caches", "weight_block_size"),
    [("fp8_ds_mla", None), ("bfloat16", None), ("fp8_ds_mla", (128, 128))],
)
def test_bytes_of_the_plan(
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caches: str,
    weight_block_size: tuple[int, int] | None,
) -> None:
    """The buffer of scores is enlarged for values over FP8 caches.

    Weights whose activations have scales that are no powers of two have no kernel for values.
    """
    monkeypatch.setattr(v4_plain, "LEAST_TOKENS", LEAST)
    monkeypatch.setattr(v4_attend_cuda, "FEW_PROGRAMS", LEAST - 1)
    config, taken = read_config(CASE.write(tmp_path)), list[int]()
    assert isinstance(config, DeepseekV4Config)
    config = replace(config, weight_block_size=weight_block_size)
    layout, batch = DeviceLayout(config, caches, CASE.block_size, 2), InputBatch(3, 24, 4, 16)
    allocate = paddle_allocator(rig.device)

    def counted(shape: tuple[int, ...], name: str) -> Any:
        tensor = allocate(shape, name)
        taken.append(tensor.element_size() * int(np.prod(shape)))
        return tensor

    own: dict[str, Any] = {"max_drafts": 2, "kv_cache_dtype": caches}
    backend = V4DeviceBackend(config, batch, 7, rig.device, "bfloat16", counted, **own)
    traits = transfers_for(allocate((1,), "float32")).traits
    assert workspace_bytes(layout, batch, "bfloat16", traits) == sum(taken)
    least = 2 * 512 * (24 + 3 * layout.ring_rows + (4 + 2) * CASE.block_size // 4)
    has_values = layout.is_fp8 and weight_block_size is None
    assert (least in taken) == (backend._plain is not None) == has_values
