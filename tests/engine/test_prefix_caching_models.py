"""Prefix caching with fp8_ds_mla caches: the demo model's tokens are those without hits.

A GEMM of another number of rows may differ in its last bits, so what is computed after a hit is
the same within rounding, not to the bit. Outputs are compared up to the first token whose lead
is so small that rounding could decide, and most tokens must have a larger one. float32 caches
under load: `tests/soak/test_modes.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import demo_model_path
from fd_dsa.engine.engine import LLMEngine
from tests.engine.fakes import run_all

SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
# a lead beyond which rounding decides nothing
LEAST_LEAD = 0.2


class Watched:
    """A runner that remembers how far the best logit leads, in every row that it gives."""

    def __init__(self, runner: Any) -> None:
        self.leads: list[float] = []
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        logits = self._runner.execute_model(logits_indices)
        best = np.partition(logits, -2, axis=1)
        self.leads += (best[:, -1] - best[:, -2]).tolist()
        return logits


def computed_whole(engine: LLMEngine, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens of prompts that take no hit, up to where rounding could decide."""
    watched = engine.runner = Watched(engine.runner)
    outputs = []
    for prompt in prompts:
        watched.leads.clear()
        engine.add_request("r", prompt, replace(SHORT, skip_reading_prefix_cache=True))
        output = run_all(engine)["r"][-1]
        assert output.num_cached_tokens == 0
        sure = [lead > LEAST_LEAD for lead in watched.leads]
        assert len(sure) == len(output.token_ids)
        outputs.append(output.token_ids[: [*sure, False].index(False)])
    assert sum(map(len, outputs)) > 0.7 * SHORT.max_tokens * len(prompts)
    return outputs


TOPK = json.loads((demo_model_path() / "config.json").read_text())["index_topk"]
# of the blocks below, the caches hold those of the text once and those of one whole prompt
TEXT_BLOCKS = TOPK // 64 + 1
NEEDLE = "Anna has hidden the magic brush in the market. "
FILLER = "The old miller walked along the river and looked at the grey clouds. "
QUESTIONS = ["Where did Anna hide the magic brush?", "What is 3 plus 4?"]


def chats_about_a_text(llm: LLM) -> list[list[int]]:
    """Prompts that begin with the same full blocks, longer than what a token selects."""
    for count in range(1000):
        text = NEEDLE + FILLER * count
        messages = [[{"role": "user", "content": f"{text}\n\n{q}"}] for q in QUESTIONS]
        chats = [llm.tokenizer.apply_chat_template(one) for one in messages]
        if len(chats[0]) > 64 * TEXT_BLOCKS + 20:
            return chats
    raise AssertionError("the tokenizer makes no tokens")


def test_questions_about_one_text_in_fp8_caches() -> None:
    """The text is shared, loses its last block to another prompt, and is completed again."""
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 200}
    sizes |= {
        "max_model_len": 64 * (TEXT_BLOCKS + 2),
        "num_gpu_blocks_override": 2 * TEXT_BLOCKS + 1,
    }
    with LLM(kv_cache_dtype="fp8_ds_mla", speculative_config="none", **sizes) as llm:
        chats = chats_about_a_text(llm)
        expected = computed_whole(llm.engine, chats)

        def ask() -> list[int]:
            outputs = [llm.generate(chat, SHORT)[0] for chat in chats]
            for tokens, output in zip(expected, outputs, strict=True):
                assert output.token_ids[: len(tokens)] == tokens
            return [output.num_cached_tokens // 64 for output in outputs]

        assert ask() == [TEXT_BLOCKS, TEXT_BLOCKS]
        other = [7 + i % 300 for i in range(64 * (TEXT_BLOCKS + 2) - 10)]
        assert llm.generate(other, replace(SHORT, max_tokens=1))[0].num_cached_tokens == 0
        assert ask() == [TEXT_BLOCKS - 1, TEXT_BLOCKS]
