"""Worker: log-probabilities of the embedded engine, at ends of prompts and while it decodes."""

from __future__ import annotations

import logging
from typing import Any

from benchmarks.workers.gpu_engine import open_device


class Engine:
    """The engine, started once.

    Args:
        model: folder of the checkpoint.
        rig: True for the device of the test plug-in, with Paddle's CPU wheel.
        device: "gpu" or "cpu".
        others: fields of EngineConfig.
    """

    def __init__(self, model: str, rig: bool, device: str = "gpu", **others: Any) -> None:
        device = open_device(rig, device)
        from fd_dsa import LLM
        from fd_dsa.config import demo_model_path

        # the log has the times of the start
        logging.basicConfig(level=logging.INFO)
        sizes: dict[str, Any] = {"max_model_len": 9216, "max_num_batched_tokens": 8192}
        sizes["kv_cache_dtype"] = "fp8"
        if device == "cpu":
            sizes = {"max_model_len": 512, "kv_cache_dtype": "bfloat16"}
        sizes |= others
        self._llm = LLM(
            model,
            device=device,
            tokenizer=demo_model_path(),
            gpu_memory_utilization=0.6,
            max_num_seqs=8,
            cudagraph_capture_sizes=(1, 2, 4, 8),
            **sizes,
        )

    def read(self, prompt: list[int], token_ids: list[int], top: int) -> list[Any]:
        """Return the likeliest tokens after the prompt and each of `token_ids` but the last."""
        prompts = [prompt + token_ids[:end] for end in range(len(token_ids))]
        return [tops[0] for tops in self._tops(prompts, 1, top)]

    def decoded(self, prompts: list[list[int]], new: int, top: int) -> list[dict[str, Any]]:
        """Return greedy tokens after each prompt, and the likeliest tokens of each step."""
        tops = self._tops(prompts, new, top)
        return [{"token_ids": [row[0][0] for row in one], "top": one} for one in tops]

    def _tops(self, prompts: list[list[int]], new: int, top: int) -> list[Any]:
        from fd_dsa import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=top)
        outputs = self._llm.generate(prompts, params)
        return [[list(one.score.top) for one in output.logprobs or ()] for output in outputs]
