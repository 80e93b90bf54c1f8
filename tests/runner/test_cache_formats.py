"""One model on caches of every format: what each changes, and what it must not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.runner import InputBatch, ModelRunner
from tests.ops.e4m3 import E4M3_VALUES
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import GLM, V32, run_rows, tiny_model

# with random weights every change of a small selection turns a token around
SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "index_topk": 60}
PROMPT = np.random.default_rng(7).integers(2, 50, 100).tolist()
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"kv_cache_dtype": "bfloat16"},
    "fp8": {"kv_cache_dtype": "fp8_ds_mla"},
    "fp8 float scales": {"kv_cache_dtype": "fp8_ds_mla", "index_scale_fmt": None},
    "fp8 hadamard": {"kv_cache_dtype": "fp8_ds_mla", "index_hadamard": True},
}


@pytest.fixture(scope="module", params=[V32, GLM], ids=["v32", "glm"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param | SIZES)


def runner_of(model: Any, **changes: Any) -> ModelRunner:
    """A runner on float32 caches, or on those of a changed layout; each row has two blocks."""
    layout = replace(model.config.cache_layout("float32", 64), **changes)
    batch = InputBatch(2, 160, 2, 64)
    runner = dsa_runner(model, batch, layout, 5)
    batch.set_blocks(0, [3, 1])
    batch.set_blocks(1, [2, 4])
    return runner


def logits(runner: ModelRunner, chunks: list[int], decode_from: int = 100) -> np.ndarray:
    """Logits of all tokens of the prompt in row 0, beside a short prompt in row 1."""
    done, found = 0, []
    for n in chunks:
        rows = [(0, PROMPT[done : done + n], done, done < decode_from)]
        rows += [(1, PROMPT[:9], 0, True)] if done else []
        found.append(run_rows(runner, rows)[:n].copy())
        done += n
    return np.concatenate(found)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine between two rows, token by token."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / lengths


def test_hadamard_changes_no_float32_score(model: Any) -> None:
    wanted = logits(runner_of(model), [100])
    found = logits(runner_of(model, index_hadamard=True), [60, 40])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", FORMATS)
def test_logits_stay_near_those_of_float32(model: Any, name: str) -> None:
    wanted = logits(runner_of(model), [100])
    whole = logits(runner_of(model, **FORMATS[name]), [100])
    assert np.median(cosines(whole, wanted)) > 0.99
    assert not np.array_equal(whole, wanted)
    # what is read is what was written, whenever that was
    for chunks, decode_from in (([37, 63], 100), ([64, *[1] * 36], 64)):
        found = logits(runner_of(model, **FORMATS[name]), chunks, decode_from)
        assert np.median(cosines(found, whole)) > 0.99999


def test_the_first_layer_s_records_are_its_float32_keys(model: Any) -> None:
    exact, fp8 = runner_of(model), runner_of(model, kv_cache_dtype="fp8_ds_mla")
    logits(exact, [100])
    logits(fp8, [100])
    latents, keys = (np.from_dlpack(cache) for cache in exact.caches[:2])
    slots = [*range(192, 256), *range(64, 100)]
    records = np.from_dlpack(fp8.caches[0]).reshape(-1, 656)[slots]
    scales = records[:, 512:528].copy().view(np.float32)
    values = E4M3_VALUES[records[:, :512]] * np.repeat(scales, 128, axis=1)
    wanted = latents.reshape(-1, 576)[slots]
    # half a step of e4m3, or of its subnormals
    limit = np.maximum(np.abs(wanted[:, :512]) * 2.0**-4, np.repeat(scales, 128, axis=1) * 2.0**-10)
    assert (np.abs(values - wanted[:, :512]) <= limit).all()
    planes = np.from_dlpack(fp8.caches[1]).reshape(-1, 64 * 132)
    codes = E4M3_VALUES[planes[:, :8192]].reshape(-1, 128)[slots]
    scales = planes[:, 8192:].copy().view(np.float32).reshape(-1)[slots, None]
    wanted = keys.reshape(-1, 128)[slots]
    limit = np.maximum(np.abs(wanted) * 2.0**-4, scales * 2.0**-10)
    assert (np.abs(codes * scales - wanted) <= limit).all()
    assert (np.frexp(scales)[0] == 0.5).all()
