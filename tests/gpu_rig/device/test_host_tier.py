"""Evicted prefix blocks in page-locked memory: they come back as they were, and no step waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from fd_dsa import LLM, SamplingParams
from tests.gpu_rig import Rig

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
PROMPTS = [[token + place % 7 for place in range(35)] for token in (20, 40)]


def test_a_prompt_comes_back_from_page_locked_memory(rig: Rig, demo_folder: Path) -> None:
    answers = []
    for size in (0, "8M"):
        with LLM(
            str(demo_folder),
            device=rig.device,
            dtype="float32",
            block_size=16,
            max_num_seqs=2,
            max_num_batched_tokens=48,
            max_model_len=48,
            num_gpu_blocks_override=3,
            kv_offload_bytes=size,
        ) as llm:
            outputs = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
            with rig.counting() as counted:
                outputs.append(llm.generate(PROMPTS[0], GREEDY)[0])
        answers.append([output.token_ids for output in outputs])
    assert answers[0] == answers[1]
    assert outputs[-1].num_host_cached_tokens == 32
    # the host waits for the tokens of steps only
    assert counted.delta.get("event_syncs", 0) <= 2 * outputs[-1].num_tokens
    # a copy of each cache in each direction, whatever the number of neighbours
    assert counted.delta["h2d_async"] > 0 and counted.delta["d2h_async"] > 0
