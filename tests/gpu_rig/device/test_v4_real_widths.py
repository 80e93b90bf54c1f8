"""DeepSeek-V4-Flash at the widths and in the formats of its release, a layer of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from custom_ops.build_library import build_library
from fd_dsa import custom_ops
from tests.gpu_rig import Rig, current
from tests.gpu_rig.device.test_formats import BOUNDS
from tests.gpu_rig.device.test_v4_fp8 import Trained, model_of
from tests.gpu_rig.device.test_v4_model import device_runner
from tests.models.published import V4_FLASH
from tests.ops.v4_records import round_on_the_cpu
from tests.v4_model.cases import Case
from tests.v4_model.ours import load_model, make_runner, prompt_logits
from tests.v4_model.quantised import FP4, write_pair

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(1200)]

NOT_WIDTHS = ("architectures", "model_type", "quantization_config", "expert_dtype", "torch_dtype")
WIDTHS: dict[str, Any] = {
    name: value for name, value in V4_FLASH.items() if name not in NOT_WIDTHS
} | {
    "layer_types": None,
    "compress_rates": None,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128],
    "num_nextn_predict_layers": 0,
    "num_hash_layers": 1,
    # a number of weights that is drawn and quantised in a minute
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
}
CASE: Case = Trained("real widths", WIDTHS, seed=61)
# across the window, entries of 128 tokens, and the tokens from which heads share a program
LENGTHS, CHUNKS, LONGEST = (300, 150), (300, 40), 512
MOST = 0.4
"""Largest error of a token with another choice, as a share of the largest logit."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The release, and its twin in float32."""
    rig = current()
    if rig is None or rig.form != "real":
        pytest.skip("GEMMs of these widths take hours in Triton's interpreter")
    return write_pair(tmp_path_factory.mktemp("v4"), FP4, CASE)


@pytest.fixture
def library() -> Iterator[Path]:
    """The kernels of custom_ops/, which are not in use before the test and after it."""
    yield build_library()
    custom_ops.use_library(None)


@pytest.mark.parametrize("caches", ["bfloat16", "fp8_ds_mla"])
def test_logits_are_those_of_the_cpu(
    rig: Rig,
    folders: tuple[Path, Path],
    library: Path,
    caches: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All tokens of two prompts in one batch, in long chunks and in short ones.

    Triton's kernels attend first, then those of custom_ops/.
    """
    folder, twin = folders
    prompts, block = [CASE.prompt(length) for length in LENGTHS], CASE.block_size
    if caches == "fp8_ds_mla":
        round_on_the_cpu(monkeypatch, rope=V4_FLASH["qk_rope_head_dim"])
    wanted = prompt_logits(make_runner(load_model(twin), block), prompts, max(LENGTHS))
    model = model_of(folder, rig)[0]
    # a batch has as many rows as it can have logits
    sizes = {"rows": sum(LENGTHS), "longest": LONGEST, "tokens": sum(LENGTHS)}
    for used, chunk in product((None, library), CHUNKS):
        custom_ops.use_library(used)
        runner = device_runner(model, rig, "bfloat16", block, kv_cache_dtype=caches, **sizes)
        found = prompt_logits(runner, prompts, chunk)
        for one, other in zip(found, wanted, strict=True):
            errors = np.abs(one - other).max(axis=1) / np.abs(other).max()
            # a few tokens have near scores, and so other experts or entries than the CPU's
            assert np.quantile(errors, 0.95) < BOUNDS["fp8"]
            assert errors.max() < MOST
            # most tokens have the CPU's best token
            assert (one.argmax(axis=1) == other.argmax(axis=1)).mean() > 0.8
    assert len({int(logits.argmax()) for logits in np.concatenate(found)}) > 20
