"""The engine with its model on the device: the CPU's tokens, and the CPU's bytes in the caches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.attention import device
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.ops.cache_write import write_caches
from fd_dsa.runner import InputBatch, ModelRunner
from tests.demo.leads import LEADS, MAX_TOKENS, num_clear
from tests.demo.samples import LEADING_PROMPTS, SHORT_PROMPTS
from tests.engine.drafters import KnowingDrafter
from tests.gpu_rig import Rig
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import GLM, V32, run_rows, tiny_model

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]


def device_of(rig: Rig) -> str:
    """Name of the plug-in's device."""
    return f"{rig.place.get_device_type()}:0"


def demo(
    folder: Path,
    device: str,
    kv_cache_dtype: str,
    large: bool,
    enforce_eager: bool = False,
    **others: Any,
) -> LLM:
    """The demo model; prompts come in chunks, and all of them in one batch."""
    return LLM(
        str(folder),
        device=device,
        dtype="float32",
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=len(LEADING_PROMPTS) if large else 2,
        max_num_batched_tokens=64 if large else 7,
        max_model_len=1024 if large else 128,
        num_gpu_blocks_override=40 if large else 4,
        enforce_eager=enforce_eager,
        **others,
    )


def watched_logits(llm: LLM, seen: Callable[[np.ndarray], None]) -> None:
    """Show `seen` the logits of every step."""
    runner = llm.engine.runner
    original = runner.compute_logits

    def logits_of(*given: Any) -> Any:
        logits = original(*given)
        if logits is not None:
            seen(logits if isinstance(logits, np.ndarray) else np.array(logits.numpy()))
        return logits

    runner.compute_logits = logits_of


def generated(llm: LLM, large: bool, **others: Any) -> list[Any]:
    """Return the greedy continuation of each prompt."""
    most = MAX_TOKENS if large else 3
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, **others)
    return llm.generate(LEADING_PROMPTS if large else SHORT_PROMPTS, params)


def greedy(llm: LLM, large: bool) -> list[list[int]]:
    """Token ids that follow each prompt."""
    return [output.token_ids for output in generated(llm, large)]


@pytest.mark.parametrize("kv_cache_dtype", LEADS)
def test_greedy_tokens_of_the_demo_model(rig: Rig, demo_folder: Path, kv_cache_dtype: str) -> None:
    with demo(demo_folder, "cpu", kv_cache_dtype, rig.is_real) as llm:
        outputs = generated(llm, rig.is_real, logprobs=2)
    with (
        demo(demo_folder, device_of(rig), kv_cache_dtype, rig.is_real) as llm,
        ThreadPoolExecutor(1) as pool,
    ):
        # as in a server: the thread that steps is not the one that loaded the model
        found = pool.submit(greedy, llm, rig.is_real).result()
    compared = 0
    for ours, output in zip(found, outputs, strict=True):
        clear = num_clear(output, kv_cache_dtype)
        assert ours[:clear] == output.token_ids[:clear]
        compared += clear
    least = LEADS[kv_cache_dtype].min_tokens if rig.is_real else 1
    assert compared >= least


class Replay:
    """Every cache write on the device, repeated by the CPU's implementation on host copies."""

    def __init__(self) -> None:
        self.num_writes = 0
        self._mirrors: dict[int, np.ndarray] = {}

    @staticmethod
    def _host(tensor: Any) -> np.ndarray | None:
        return None if tensor is None else np.array(tensor.contiguous().numpy())

    def _mirror(self, cache: Any) -> np.ndarray | None:
        """The CPU's cache, which starts with the bytes of the device's."""
        if cache is None:
            return None
        return self._mirrors.setdefault(cache.data_ptr(), self._host(cache))

    def __call__(self, *arguments: Any) -> None:
        """`write_caches`, twice; the whole caches are compared."""
        *inputs, latent_cache, index_cache, params = arguments
        caches = latent_cache, index_cache
        mirrors = [self._mirror(cache) for cache in caches]
        on_host = [self._host(tensor) for tensor in inputs]
        write_caches(*arguments)
        weights = ("kv_norm_weight", "k_norm_weight", "k_norm_bias")
        host_params = replace(params, **{n: self._host(getattr(params, n)) for n in weights})
        write_caches(*on_host, *mirrors, host_params)
        for cache, mirror in zip(caches, mirrors, strict=True):
            if cache is not None:
                assert cache.numpy().tobytes() == mirror.tobytes(), f"write {self.num_writes}"
        self.num_writes += 1


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "fp8_ds_mla"])
def test_every_write_leaves_the_bytes_of_the_cpu(
    rig: Rig, demo_folder: Path, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, steps = Replay(), []
    # the writes of a graph's replay go through no Python; test_captured_decode.py has them
    with demo(demo_folder, device_of(rig), kv_cache_dtype, rig.is_real, enforce_eager=True) as llm:
        num_layers = llm.engine.runner.model.config.num_hidden_layers
        # only now: the warm-up reads slots that nobody has written, and any NaN may come of that
        monkeypatch.setattr(device, "write_caches", replay)
        watched_logits(llm, steps.append)
        greedy(llm, rig.is_real)
    assert replay.num_writes == num_layers * len(steps)


def tiny_runner(fields: dict[str, Any], kv_cache_dtype: str, device: str) -> ModelRunner:
    """A tiny random model with a selection of 12, four rows of shuffled blocks."""
    model = tiny_model(fields, device=device)
    batch = InputBatch(4, 48, 3, 16)
    runner = dsa_runner(model, batch, model.config.cache_layout(kv_cache_dtype, 16), 13, device)
    blocks = np.random.default_rng(0).permutation(13)
    for row in range(4):
        batch.set_blocks(row, blocks[3 * row : 3 * row + 3])
    return runner


@pytest.mark.parametrize(
    ("fields", "kv_cache_dtype"), [(V32, "float32"), (GLM, "bfloat16")], ids=["v32", "glm"]
)
def test_logits_of_tiny_models(rig: Rig, fields: dict[str, Any], kv_cache_dtype: str) -> None:
    first, second = np.random.default_rng(7).integers(2, 50, (2, 30)).tolist()
    # a prompt in two chunks beside another one, then decode and a token with a draft
    steps = [
        [(0, first[:10], 0, True), (2, second[:14], 0, True)],
        [(0, first[10:16], 10, True), (2, second[14:15], 14, False)],
        [(0, first[16:17], 16, False), (2, second[15:17], 15, False)],
    ]
    runners = [tiny_runner(fields, kv_cache_dtype, d) for d in ("cpu", device_of(rig))]
    # a value midway between two bfloat16 numbers may go to either side
    tolerance = 1e-4 if kv_cache_dtype == "float32" else 2e-3
    for rows in steps:
        wanted, found = (run_rows(runner, rows) for runner in runners)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("right_share", [1.0, 0.0])
def test_drafts_change_no_token_on_the_device(
    rig: Rig, demo_folder: Path, right_share: float
) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, seed=0)
    with demo(demo_folder, "cpu", "float32", False) as llm:
        wanted = [output.token_ids for output in llm.generate(SHORT_PROMPTS, params)]
    method = {"method": "ngram", "num_speculative_tokens": 3}
    with demo(demo_folder, device_of(rig), "float32", False, speculative_config=method) as llm:
        engine = llm.engine
        answers = {(f"0-{i}", 0): tokens for i, tokens in enumerate(wanted)}
        # no measured costs of steps decide how many drafts there are
        engine.spec_decoder = SpecDecoder(KnowingDrafter(answers, right_share, 4096), 3)
        assert [output.token_ids for output in llm.generate(SHORT_PROMPTS, params)] == wanted
        stats = engine.stats()
    assert stats.num_draft_tokens >= 6
    assert stats.num_accepted_tokens == right_share * stats.num_draft_tokens
