"""The engine on fp8_ds_mla caches: the flag, its memory, and the demo model's answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.errors import ConfigError
from fd_dsa.startup.build import build_engine
from tests.models.folders import TINY

NEEDLE = "Anna has hidden the magic brush in the market. "
FILLER = "The old miller walked along the river and looked at the grey clouds. "
QUESTION = "Where did Anna hide the magic brush?"
ANSWER = "Anna hid the magic brush in the market."


def test_blocks_take_788_bytes_a_token_and_layer() -> None:
    engine = build_engine(
        EngineConfig(
            kv_cache_dtype="fp8_ds_mla",
            max_num_seqs=2,
            kv_cache_memory_bytes="40M",
            speculative_config="none",
        )
    )
    caches = [np.from_dlpack(cache) for cache in engine.runner.caches]
    num_blocks = (40 << 20) // (64 * 788 * 6)
    assert [c.shape for c in caches[:2]] == [(num_blocks, 1, 64, 656), (num_blocks, 64, 132)]
    assert sum(c.nbytes for c in caches) == num_blocks * 64 * 788 * 6


def test_a_needle_past_the_selection_is_found() -> None:
    """About 450 tokens, of which a token sees 256; greedy, beside other requests."""
    prompt = f"{FILLER * 3}{NEEDLE}{FILLER * 25}\n\n{QUESTION}"
    chats = [
        [{"role": "user", "content": text}]
        for text in (prompt, "What is the capital of France?", "What is 7 + 5?")
    ]
    llm = LLM(kv_cache_dtype="fp8_ds_mla", max_num_seqs=3, max_num_batched_tokens=100)
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=30))
    assert len(outputs[0].prompt_token_ids) > 350
    assert [o.text for o in outputs] == [
        ANSWER,
        "The capital of France is Paris.",
        "7 + 5 = 12.",
    ]


def test_a_model_of_other_widths_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ConfigError, match=r"kv_lora_rank: got 20; must be 512 .*fp8_ds_mla"):
        build_engine(EngineConfig(model=tmp_path, kv_cache_dtype="fp8_ds_mla"))
