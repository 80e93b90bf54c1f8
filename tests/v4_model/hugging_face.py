"""transformers' DeepSeek-V4 as the oracle: logits of one prompt at a time, without a cache.

Its cached path agrees within rounding; its left-padded batches do not, since padding is pooled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer


def load_dequantised(folder: Path) -> Any:
    """The model of a folder with FP8 or FP4 weights, which transformers dequantises."""
    # it asks for a library that a CPU does not need
    with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment", lambda *a, **k: None):
        model = load(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    # tensors that are not quantised are still in the type of the file
    return model.float()


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder, float32, eager."""
    model, info = DeepseekV4ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    left = {key: info[key] for key in ("missing_keys", "unexpected_keys") if info[key]}
    if left:
        raise RuntimeError(f"{folder}: transformers did not take the checkpoint: {left}")
    return model.eval()


@torch.no_grad()
def logits(model: Any, prompt: list[int]) -> np.ndarray:
    """float32 [len(prompt), vocab_size]."""
    return model(torch.tensor([prompt]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """Tokens of `generate` with its cache, and the best logit of each step over the second."""
    found = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        min_new_tokens=steps,
        max_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # `min_new_tokens` bans the end of the text, which these logits do not show
    best = torch.stack([step[0] for step in found.logits])
    best[:, model.config.eos_token_id] = -torch.inf
    top = best.topk(2).values
    tokens = found.sequences[0, len(prompt) :].tolist()
    return tokens, (top[:, 0] - top[:, 1]).numpy()
