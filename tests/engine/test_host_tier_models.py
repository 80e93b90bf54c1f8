"""Blocks of the demo model in host memory, with its layer for drafts: all bytes come back.

A hit in host memory and one in the caches compute the same rows, so their tokens are the same.
"""

from __future__ import annotations

from typing import Any

import pytest

from fd_dsa import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[7 + place * step % 300 for place in range(200)] for step in (1, 3, 5)]
SIZES: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 256, "max_num_batched_tokens": 200}


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "fp8_ds_mla"])
def test_a_hit_in_host_memory_is_as_good_as_one_in_the_caches(
    kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # measured costs decide on the number of drafts, and so on the rows of a step
    monkeypatch.setattr("fd_dsa.startup.build.measure_step_costs", lambda *_: None)
    found = []
    for fields in (
        {"num_gpu_blocks_override": 40},
        {"num_gpu_blocks_override": 5, "kv_offload_bytes": "64M"},
    ):
        with LLM(kv_cache_dtype=kv_cache_dtype, **SIZES, **fields) as llm:
            for prompt in PROMPTS:
                llm.generate(prompt, GREEDY)
            found.append([llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS])
            assert llm.stats().num_draft_tokens > 0
    for kept, copied in zip(*found, strict=True):
        assert copied.token_ids == kept.token_ids
        assert copied.num_cached_tokens == kept.num_cached_tokens == 192
        assert copied.num_host_cached_tokens > 0 == kept.num_host_cached_tokens
        assert copied.num_accepted_tokens == kept.num_accepted_tokens
