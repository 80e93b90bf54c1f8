"""Models with experts in four bits on the device, beside the same values in bfloat16 there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.models import four_bit_check
from fd_dsa.models.device_weights import DeviceWeights
from fd_dsa.models.four_bit_experts import four_bit_experts
from fd_dsa.models.loader import fp8_tensors, load_weights
from fd_dsa.models.registry import create_model, open_checkpoint, read_config
from fd_dsa.ops.device_matrix import FourBitExperts
from fd_dsa.runner import ModelRunner
from fd_dsa.startup.load import load_model
from fd_dsa.startup.plan import make_plan
from fd_dsa.startup.progress import StartupProgress
from tests.gpu_rig import Rig
from tests.gpu_rig.device.test_formats import logits_of, runner_of
from tests.models.four_bits import FORMATS, write_pair

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

# of the largest logit; the twin's experts are rounded to bfloat16
BOUND = 0.015
QUICK = "nvfp4 of modelopt", "awq", "gptq", "w4afp8"
HELD = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in FORMATS
    if "act-order" not in name
]


def runner_on(folder: Path, rig: Rig, *, dequantised: bool = False) -> ModelRunner:
    """A runner of the folder's model."""
    config = read_config(folder)
    with open_checkpoint(config, folder) as checkpoint:
        weights = DeviceWeights(
            "bfloat16",
            paddle_allocator(rig.device),
            fp8_tensors(checkpoint, config),
            round_scales=config.round_scales,
            four_bits=None if dequantised else four_bit_experts(checkpoint, config, 1),
        )
        model = create_model(config, weights)
        load_weights(checkpoint, config, weights.loaders)
        weights.finish()
    assert isinstance(model.layers[1].mlp.experts[0], FourBitExperts) != dequantised
    return runner_of(model, rig.device)


def differences(folder: Path, rig: Rig) -> list[float]:
    """Largest difference of the logits of each step, as a share of the largest logit."""
    steps = (logits_of(runner_on(folder, rig, dequantised=one)) for one in (False, True))
    return [
        float(np.abs(found - wanted).max() / np.abs(wanted).max())
        for found, wanted in zip(*steps, strict=True)
    ]


@pytest.mark.parametrize("name", HELD)
def test_logits_are_those_of_the_dequantised_model(rig: Rig, tmp_path: Path, name: str) -> None:
    """Prompts, decode rows and rows of padding."""
    found = differences(write_pair(tmp_path, FORMATS[name])[0], rig)
    assert all(0 < one < BOUND for one in found), found


def plan_of(folder: Path, device: str, **fields: Any) -> Any:
    """The plan of a small engine."""
    sizes = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 64, "dtype": "bfloat16"}
    return make_plan(EngineConfig(model=folder, device=device, **sizes, **fields))


def test_an_engine_holds_four_bits(rig: Rig, tmp_path: Path) -> None:
    """The plan counts them, and its model has them."""
    folder, twin = write_pair(tmp_path, FORMATS["nvfp4 of compressed-tensors"])
    plan, wide = plan_of(folder, rig.device), plan_of(twin, rig.device)
    # 12 matrices of 256 x 128
    less = 12 * (256 * 128 * (2 - 0.5 - 1 / 16) - 4)
    assert wide.memory.weight_bytes - plan.memory.weight_bytes == less
    model = load_model(plan, None, StartupProgress())
    assert isinstance(model.layers[1].mlp.experts[0], FourBitExperts)
    with LLM(model=folder, device=rig.device, block_size=16, max_num_seqs=4) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        prompts = [FORMATS["awq"].case.prompt(n) for n in (12, 40)]
        answers = llm.generate(prompts, params)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [4, 4]


def test_a_wrong_kernel_is_not_used(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The start says so, and plans the experts in bfloat16."""
    folder, twin = write_pair(tmp_path, FORMATS["nvfp4 of compressed-tensors"])
    monkeypatch.setattr(four_bit_check, "difference", lambda *given: "all rows differ")
    plan = plan_of(folder, rig.device)
    assert plan.four_bits is None
    assert plan.memory.weight_bytes == plan_of(twin, rig.device).memory.weight_bytes
    line = f"{rig.device}: experts in four bits are dequantised: all rows differ"
    assert line in caplog.messages
