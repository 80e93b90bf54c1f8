"""The demo model's leads on a CPU, on which the tests of a GPU depend.

A training changes them, and most runs of the tests have no GPU.
"""

from __future__ import annotations

import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import demo_model_path
from tests.demo.leads import LEADS, MAX_TOKENS, num_clear
from tests.demo.samples import LEADING_PROMPTS


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", LEADS)
def test_enough_tokens_lead_clearly(kv_cache_dtype: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
    sizes = {"max_model_len": 1024, "max_num_batched_tokens": 64}
    with LLM(
        str(demo_model_path()), dtype="float32", kv_cache_dtype=kv_cache_dtype, **sizes
    ) as llm:
        outputs = llm.generate(LEADING_PROMPTS, params)
    clear = [num_clear(output, kv_cache_dtype) for output in outputs]
    assert sum(clear) >= LEADS[kv_cache_dtype].min_tokens, clear
