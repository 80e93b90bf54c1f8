"""Worker: a model in transformers, `generate` with its cache, float32 on the CPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks._harness import random_prompts
from fd_dsa.config import demo_model_path
from fd_dsa.environment import usable_cpus


class Model:
    """The model, loaded once.

    Args:
        model: its folder; None = the demo model.
    """

    def __init__(self, model: str | None = None) -> None:
        torch.set_num_threads(usable_cpus())
        folder = model or demo_model_path()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    @torch.no_grad()
    def generate(
        self, requests: int, prompt_tokens: int, new_tokens: int, seed: int
    ) -> dict[str, Any]:
        """Return seconds to generate `new_tokens` for each of `requests` random prompts."""
        vocab_size = self.model.config.vocab_size
        batch = torch.tensor(random_prompts(requests, prompt_tokens, vocab_size, seed))
        start = time.perf_counter()
        out = self.model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        seconds = time.perf_counter() - start
        if out.shape[1] != prompt_tokens + new_tokens:
            raise RuntimeError(f"generate returned {out.shape[1] - prompt_tokens} new tokens")
        return {"seconds": seconds}
