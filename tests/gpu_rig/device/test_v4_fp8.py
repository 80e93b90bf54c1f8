"""DeepSeek-V4 with its projections in block FP8 on the device, beside the CPU's float32."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fd_dsa.config import EngineConfig
from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.distributed import Group
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.four_bit_experts import four_bit_experts
from fd_dsa.models.loader import (
    fp8_tensors,
    load_dummy_weights,
    load_weights,
    with_whole_blocks,
)
from fd_dsa.models.mtp_layer import add_mtp_layer
from fd_dsa.models.registry import create_model, open_checkpoint, read_config
from fd_dsa.startup.memory import weight_bytes
from fd_dsa.startup.plan import make_plan
from tests.gpu_rig import Rig
from tests.gpu_rig.device.test_formats import BOUNDS
from tests.gpu_rig.device.test_v4_captured import check, pair_of
from tests.gpu_rig.device.test_v4_model import LONGEST, SMOOTH, device_runner, worst
from tests.gpu_rig.device.test_v4_mtp import ROW, on_device
from tests.gpu_rig.device.test_v4_ranks import on_two_ranks
from tests.v4_model.cases import Case
from tests.v4_model.drafts import MTP
from tests.v4_model.ours import load_model, make_runner, prompt_logits, run_step
from tests.v4_model.quantised import FP4, Release, write_pair

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]

# parts of a GEMM begin at blocks, as in every release; the hidden size is no multiple of one
SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "head_dim": 64,
}


class Trained(Case):
    """A model in which a layer adds less than what it is added to, as in trained models."""

    def write(self, folder: Path, names: str = "saved") -> Path:
        path = super().write(folder, names) / "model.safetensors"
        tensors = load_file(path)
        for name, values in tensors.items():
            if "embed" in name:
                tensors[name] = 2 * values
            elif name.endswith(("wo_b.weight", "w2.weight")):
                tensors[name] = values * np.float32(0.3)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder


CASE = Trained("whole blocks", SMOOTH | SIZES, seed=23)
WITH_LAYER = Trained("whole blocks", SMOOTH | SIZES | MTP, seed=23)


def model_of(
    folder: Path,
    rig: Rig,
    group: Group | None = None,
    *,
    mtp: bool = False,
    dummy: bool = False,
) -> tuple[Any, int]:
    """The model of a folder, or a rank's part, on the device as stored, and its bytes."""
    config, sizes = read_config(folder), []
    native, ranks = paddle_allocator(rig.device), group.size if group else 1

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        made = native(shape, dtype)
        sizes.append(made.element_size() * prod(shape))
        return made

    with open_checkpoint(config, folder) as checkpoint:
        if mtp:
            config = add_mtp_layer(checkpoint, config)
        fp8 = with_whole_blocks(config, ranks, fp8_tensors(checkpoint, config))
        held = fp8, four_bit_experts(checkpoint, config, ranks)
        weights = DeviceWeights(
            "bfloat16",
            allocate,
            held[0],
            round_scales=config.round_scales,
            group=group,
            four_bits=held[1],
        )
        model = create_model(config.split(ranks), weights)
        if dummy:
            load_dummy_weights(config, weights.loaders, 0, group=group)
        else:
            load_weights(checkpoint, config, weights.loaders, group=group)
    weights.finish()
    assert sum(sizes) == weight_bytes(config.split(ranks), "bfloat16", *held)
    return model, sum(sizes)


@pytest.mark.parametrize("experts", ["fp4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_logits_are_those_of_the_twin(rig: Rig, tmp_path: Path, experts: str) -> None:
    """Compare all tokens of two prompts, in chunks."""
    folder, twin = write_pair(tmp_path, Release(experts), CASE)
    prompts = [CASE.prompt(n) for n in (20, 7)]
    wanted = prompt_logits(make_runner(load_model(twin), CASE.block_size), prompts, 20)
    runner = device_runner(model_of(folder, rig)[0], rig, "bfloat16", CASE.block_size)
    found = prompt_logits(runner, prompts, 12)
    assert worst(found, wanted) < BOUNDS["fp8"]
    for ours, theirs in zip(found, wanted, strict=True):
        # a wrong block or scale is off by more on average, too
        error = np.sqrt(np.mean((ours - theirs) ** 2))
        assert error < BOUNDS["fp8"] / 4 * np.abs(theirs).max()


def test_captured_steps_are_those_of_eager_ones(rig: Rig, tmp_path: Path) -> None:
    folder, _ = write_pair(tmp_path, FP4, CASE)
    model, _ = model_of(folder, rig)
    with pair_of(rig, model, (2, 4), (12,), "bfloat16") as (eager, graphs):
        for step in ([(0, 0, 7)], [(0, 7), (2, 15)], [(0, 8), (1, 14), (2, 16)]):
            check(eager, graphs, step, 2e-3)
            assert graphs.graph_key is not None and graphs.graph_key[1] == LONGEST


def test_projections_keep_their_codes(rig: Rig, tmp_path: Path) -> None:
    """The plan of an engine holds them as FP8, without a checkpoint too."""
    folder, _ = write_pair(tmp_path, FP4, WITH_LAYER)
    config = add_mtp_layer(None, read_config(folder))
    sizes = {"device": rig.device, "block_size": 16, "enforce_eager": True}
    layer = {"method": "mtp", "num_speculative_tokens": 1}
    own = {"dtype": "bfloat16", "speculative_config": layer, "max_model_len": 64}
    plan = make_plan(EngineConfig(model=folder, **sizes, **own))
    assert plan.fp8 == fp8_tensors(None, config)
    ends = {".".join(name.split(".")[-3:-1]) for name in plan.fp8}
    attention = {f"attn.{name}" for name in ("wq_a", "wkv", "wq_b", "wo_a", "wo_b")}
    experts = {f"shared_experts.{name}" for name in ("w1", "w2", "w3")}
    assert ends == attention | experts | {"indexer.wq_b", "0.e_proj", "0.h_proj"}
    _, num_bytes = model_of(folder, rig, mtp=True)
    assert plan.memory.weight_bytes == num_bytes
    wide = weight_bytes(config, "bfloat16", four_bits=plan.four_bits)
    assert 0.5 < num_bytes / wide < 0.85


def test_logits_of_the_draft_layer(rig: Rig, tmp_path: Path) -> None:
    folder, twin = write_pair(tmp_path, FP4, WITH_LAYER)
    prompt, size = WITH_LAYER.prompt(14), 13
    cpu = make_runner(load_model(twin, mtp=True), WITH_LAYER.block_size, max_drafts=1)
    model, _ = model_of(folder, rig, mtp=True)
    runner = device_runner(model, rig, "bfloat16", WITH_LAYER.block_size, drafts=1)
    for one in (cpu, runner):
        run_step(one, {ROW: (prompt[:size], 0)})
    wanted = cpu.predict_more(np.array(prompt[1:]), range(size))
    _, found = on_device(runner, prompt[1:])
    assert worst([found], [wanted]) < BOUNDS["fp8"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 256])
def test_logits_of_two_ranks(rig: Rig, tmp_path: Path, width: int) -> None:
    """Each of them has a group of wo_a, and half a block of the shared expert or whole ones."""
    if rig.is_real:
        pytest.skip("its ranks are processes")
    case = Trained("ranks", CASE.changes | {"moe_intermediate_size": width}, seed=24)
    folder, _ = write_pair(tmp_path, FP4, case)

    def logits(group: Group | None) -> list[np.ndarray]:
        model, _ = model_of(folder, rig, group)
        return prompt_logits(device_runner(model, rig, "bfloat16", 16), [case.prompt(9)], 9)

    wanted, ranks = logits(None), on_two_ranks(rig, logits)
    np.testing.assert_array_equal(ranks[0][0], ranks[1][0])
    assert worst(ranks[0], wanted) < BOUNDS["fp8"] / 2


def test_a_rank_has_whole_blocks(tmp_path: Path) -> None:
    folder, _ = write_pair(tmp_path, FP4, CASE)
    config = read_config(folder)
    fp8 = fp8_tensors(None, config)
    found = with_whole_blocks(config, 2, fp8)
    assert fp8 - found == {name for name in fp8 if ".shared_experts." in name} != set()


@pytest.mark.slow
def test_random_weights_are_finite(rig: Rig, tmp_path: Path) -> None:
    folder, _ = write_pair(tmp_path, FP4, CASE)
    model, _ = model_of(folder, rig, dummy=True)
    runner = device_runner(model, rig, "bfloat16", CASE.block_size)
    (logits,) = prompt_logits(runner, [CASE.prompt(9)], 9)
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10
