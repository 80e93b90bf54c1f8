"""Real quantisers of a tiny model, whose folders are served: `-m network tests/models`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fd_dsa import LLM, SamplingParams
from fd_dsa.models.registry import read_config
from tests.distributed.sums import rounded, widened
from tests.models.four_bits import CASE as FOUR_BITS
from tests.v4_model.cases import write_tokenizer
from tests.v4_model.quantised import loaded

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.network, pytest.mark.oracle, pytest.mark.slow]
# torch and transformers are those of the project; other packages of a quantiser come alone
PACKAGES = {
    "llmcompressor": ("llmcompressor==0.14.0.1", "compressed-tensors==0.20.0", "loguru"),
    "modelopt": (
        "nvidia-modelopt==0.47.0",
        *("omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3", "pulp", "torchprofile"),
        *("ninja", "nvidia-ml-py"),
    ),
    "autoround": ("auto-round==0.16.1", "py-cpuinfo"),
}
SCHEMES = {
    "llmcompressor W4A16": "INT4 (compressed-tensors)",
    "llmcompressor W4A16_ASYM": "INT4 (compressed-tensors)",
    "llmcompressor NVFP4": "NVFP4 (compressed-tensors)",
    "llmcompressor NVFP4A16": "NVFP4 (compressed-tensors)",
    "modelopt NVFP4_DEFAULT_CFG": "NVFP4 (modelopt)",
    "autoround auto_gptq,asym": "INT4 (gptq)",
    "autoround auto_gptq,sym": "INT4 (gptq)",
    "autoround auto_awq,asym": "INT4 (awq)",
    "autoround auto_round,sym": "INT4 (gptq)",
    "autoround auto_round:auto_awq,asym": "INT4 (awq)",
}


# rows of whole groups of 128
WIDTHS = {"intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32}
CASE = replace(FOUR_BITS, changes=FOUR_BITS.changes | WIDTHS)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of installed packages for each quantiser."""
    found = {}
    for name, wanted in PACKAGES.items():
        found[name] = tmp_path_factory.mktemp(name)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(found[name]), *wanted, "accelerate==1.15.0"], check=True)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_folders_of_quantisers(scheme: str, packages: dict[str, Path], tmp_path: Path) -> None:
    """Values are those of the quantiser's own decoder, and the folder answers a prompt."""
    name, _, preset = scheme.partition(" ")
    base, out = CASE.write(tmp_path / "base"), tmp_path / "out"
    command = [sys.executable, "-m", "tests.models.quantisers", name, preset, str(base), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(packages[name])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = read_config(out)
    assert config.packing is not None and config.packing.title == SCHEMES[scheme]
    found, wanted = loaded(out), load_file(f"{out}.safetensors")
    # up-projections of the four experts of layer 1, among others
    assert sum("experts." in one and "up_proj" in one for one in wanted) >= 4
    for key, values in wanted.items():
        # AutoRound's own values are bfloat16
        own = widened(rounded(found[key])) if name == "autoround" else found[key]
        np.testing.assert_array_equal(own, values, key)
    write_tokenizer(out)
    with LLM(model=out, device="cpu", block_size=16, max_num_seqs=2) as llm:
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        (answer,) = llm.generate([CASE.prompt(30)], params)
    assert len(answer.outputs[0].token_ids) == 8
