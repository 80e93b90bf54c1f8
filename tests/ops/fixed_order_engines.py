"""Engines of many forms over the demo model, and every logit that they sample from."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.config import EngineConfig
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.startup.build import build_engine
from tests.engine.fakes import random_clock

# of the second prompt the selection leaves keys out
LENGTHS = (70, 300)
FORMS: tuple[dict[str, Any], ...] = (
    {"max_num_seqs": 1},
    {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 7, "enable_prefix_caching": True},
)
BASE: dict[str, Any] = {
    "device": "cpu",
    "kv_cache_dtype": "fp8_ds_mla",
    "max_model_len": 400,
    "num_gpu_blocks_override": 20,
    "enable_prefix_caching": False,
}


# the seed of a random clock, by which chunks beside running answers come out differently
CLOCK = 1
PACED: dict[str, Any] = {"max_num_batched_tokens": 96, "target_inter_token_latency_ms": 50}


class Watched:
    """A runner that remembers the logits of its last step, and the prompt tokens of each."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.chunks: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        self.chunks.append(self._runner.input_batch.num_prefill_tokens)
        self.logits = self._runner.execute_model(logits_indices)
        return self.logits


def logits_of(
    form: dict[str, Any], clock_seed: int | None = None
) -> tuple[list[np.ndarray], list[int]]:
    """Compute the logits of an engine of this form.

    Args:
        form: fields of its configuration.
        clock_seed: of a random clock; None = the real one.

    Returns:
        float32 [6, vocab_size] for each prompt, and the prompt tokens of each step.
    """
    engine = build_engine(EngineConfig(**{**BASE, **form}, speculative_config="none"))
    watched = Watched(engine.runner)
    engine.runner = watched
    if clock_seed is not None:
        engine.clock = random_clock(clock_seed)
    random = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {}
    for index, length in enumerate(LENGTHS):
        prompt = random.integers(100, 4000, length).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        engine.add_request(str(index), prompt, params)
        found[str(index)] = []
    while engine.has_unfinished_requests():
        for row, output in enumerate(engine.step()):
            found[output.request_id].append(watched.logits[row].copy())
    return [np.array(rows) for rows in found.values()], watched.chunks
