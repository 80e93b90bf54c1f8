"""Logits of models on the device beside those of Hugging Face transformers in the same format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu_rig import Rig
from tests.gpu_rig.device.test_formats import (
    BOUNDS,
    IDS,
    SIZES,
    STEPS,
    clear_lead,
    folder_of,
    logits_of,
    runner_on,
    tokens_of,
)
from tests.runner.tiny import GLM, V32

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.oracle]

# matrices of two by three blocks; transformers rounds no scale of activations
SEVERAL_BLOCKS: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "num_hidden_layers": 2,
    "quantization_config": {"quant_method": "fp8"},
}
NO_KERNEL = 3


def logits_on(folder: Path, rig: Rig) -> np.ndarray:
    """Logits of a row that comes in chunks and then token by token, beside another one."""
    found = logits_of(runner_on(folder, rig.device))
    return np.concatenate(
        [logits[tokens_of(step, 0)] for step, logits in zip(STEPS, found, strict=True)]
    )


def check(found: np.ndarray, wanted: np.ndarray, bound: float) -> None:
    """Logits within a bound, and the same token where the lead is clear."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)
    # a wrong block or scale is off by more on average, too
    assert np.sqrt(np.mean((found - wanted) ** 2)) < bound / 3
    clear = clear_lead(wanted, 2 * bound)
    assert clear.any() and (found.argmax(1) == wanted.argmax(1))[clear].all()


@pytest.mark.parametrize("fields", [V32, GLM], ids=["v32", "glm"])
def test_logits_in_bfloat16(rig: Rig, tmp_path: Path, fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = folder_of(tmp_path, fields | SIZES, "bfloat16")
    found = logits_on(folder, rig)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = model(torch.tensor([IDS[: len(found)]])).logits[0].float().numpy()
    check(found, wanted, BOUNDS["bfloat16"] * np.abs(wanted).max())


def by_hugging_face(kernel: str, tokens: list[int], *folders: Path) -> np.ndarray:
    """Logits of folders by transformers in FP8, from a process of its own."""
    ids, out = (folders[0].parent / name for name in ("ids.json", "logits.npy"))
    ids.write_text(json.dumps(tokens))
    command = [sys.executable, "-m", "tests.parity.hugging_face_fp8", kernel]
    # its kernels are compiled, whatever those of this process are
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, *map(str, (ids, out, *folders))],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode == NO_KERNEL:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return np.asarray(np.load(out))


@pytest.mark.parametrize("kernel", ["transformers", "torch"])
@pytest.mark.parametrize(
    "fields", [V32, GLM | {"indexer_types": ["full", "shared"]}], ids=["v32", "glm"]
)
def test_logits_in_fp8(rig: Rig, tmp_path: Path, fields: dict[str, Any], kernel: str) -> None:
    """Scales of other blocks are seen, whichever side reads them."""
    fields = fields | SIZES | SEVERAL_BLOCKS
    folder, other = (tmp_path / name for name in ("model", "other"))
    folder_of(folder, fields, "fp8")
    folder_of(other, fields, "fp8", lambda scales: scales.T.reshape(scales.shape))
    num_tokens = sum(int(tokens_of(step, 0).sum()) for step in STEPS)
    # it may skip the test, so it comes before the kernels that may be interpreted
    wanted, wanted_of_other = by_hugging_face(kernel, IDS[:num_tokens], folder, other)
    found, of_other = (logits_on(one, rig) for one in (folder, other))
    bound = BOUNDS["fp8"] * np.abs(wanted).max()
    check(found, wanted, bound)
    for wrong in (of_other - wanted, found - wanted_of_other):
        assert np.abs(wrong).max() > 3 * bound
