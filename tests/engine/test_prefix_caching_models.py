"""Prefix caching with real caches: a model generates the tokens that it generates without hits.

A GEMM of another number of rows may differ in its last bits, so what is computed after a hit is
the same within rounding, not to the bit. Outputs are compared up to the first token whose lead
is so small that rounding could decide, and most tokens must have a larger one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import demo_model_path
from fd_dsa.engine.engine import LLMEngine
from tests.engine.fakes import run_all
from tests.engine.test_topk_positions import tiny_engine
from tests.runner.tiny import GLM, V32

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SHORT = replace(GREEDY, max_tokens=6)
# leads beyond which rounding decides nothing: of random models, and of the demo model
LEAST_LEAD = {"float32": 1e-3, "bfloat16": 5e-3, "fp8_ds_mla": 0.2}


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


@dataclass(frozen=True)
class Sure:
    """What a prompt gives when all of it is computed, up to where rounding could decide."""

    tokens: list[int]
    num_sure: int

    def agrees(self, found: list[int]) -> bool:
        """Whether the two differ by rounding only."""
        return found[: self.num_sure] == self.tokens[: self.num_sure]


def computed_whole(
    engine: LLMEngine, prompts: list[list[int]], params: SamplingParams, least_lead: float
) -> list[Sure]:
    """Outputs of prompts that take no hit, computed in order."""
    watched = engine.runner = Watched(engine.runner)
    outputs = []
    for prompt in prompts:
        watched.leads.clear()
        engine.add_request("r", prompt, replace(params, skip_reading_prefix_cache=True))
        output = run_all(engine)["r"][-1]
        assert output.num_cached_tokens == 0
        sure = [lead > least_lead for lead in watched.leads]
        assert len(sure) == len(output.token_ids)
        outputs.append(Sure(output.token_ids, [*sure, False].index(False)))
    num_tokens = sum(len(output.tokens) for output in outputs)
    assert sum(output.num_sure for output in outputs) > 0.7 * num_tokens
    return outputs


def random_prompts(seed: int) -> list[list[int]]:
    """Twelve prompts of 25 to 52 tokens, of which four each begin alike."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(2, 50, 42).tolist() for _ in range(3)]
    return [
        stems[i % 3][: 20 + 2 * i] + rng.integers(2, 50, 5 + i // 2).tolist() for i in range(12)
    ]


@pytest.mark.parametrize(
    ("fields", "kv_cache_dtype", "seed"),
    [(V32, "float32", 5), (GLM, "bfloat16", 8)],
    ids=["v32-float32", "glm-bfloat16"],
)
def test_a_small_cache_under_load(fields: dict[str, Any], kv_cache_dtype: str, seed: int) -> None:
    """Hits, evictions, preemptions and aborts at once."""
    prompts = random_prompts(seed)
    # it attends to all keys: among its random scores, rounding would change the selection
    fields = fields | {"index_topk": 96}
    reference = tiny_engine(fields, kv_cache_dtype, 24)
    expected = computed_whole(reference, prompts, GREEDY, LEAST_LEAD[kv_cache_dtype])

    engine = tiny_engine(fields, kv_cache_dtype, 38)
    found: dict[str, list[int]] = {}
    for turn in range(2):
        for index, prompt in enumerate(prompts):
            engine.add_request(f"{turn}-{index}", prompt, GREEDY)
            engine.add_request("gone", prompt[::-1], GREEDY)
            for output in (*engine.step(), *engine.step()):
                found[output.request_id] = output.token_ids
            engine.abort_request("gone")
        found |= {name: outputs[-1].token_ids for name, outputs in run_all(engine).items()}
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0.3 * stats.prefix_cache_queries
    for turn in range(2):
        for index, sure in enumerate(expected):
            assert sure.agrees(found[f"{turn}-{index}"]), (turn, index)


TOPK = json.loads((demo_model_path() / "config.json").read_text())["index_topk"]
# of the blocks below, the caches hold those of the text once and those of one whole prompt
TEXT_BLOCKS = TOPK // 64 + 1
NEEDLE = "Anna has hidden the magic brush in the market. "
FILLER = "The old miller walked along the river and looked at the grey clouds. "
QUESTIONS = ["Where did Anna hide the magic brush?", "Who walked along the river?"]


@pytest.fixture(scope="module")
def fp8() -> Iterator[LLM]:
    """The demo model with few fp8_ds_mla caches."""
    with LLM(
        kv_cache_dtype="fp8_ds_mla",
        max_num_seqs=2,
        max_num_batched_tokens=200,
        max_model_len=64 * (TEXT_BLOCKS + 2),
        num_gpu_blocks_override=2 * TEXT_BLOCKS + 1,
    ) as llm:
        yield llm


def chats_about_a_text(llm: LLM) -> list[list[int]]:
    """Prompts that begin with the same full blocks, longer than what a token selects."""
    for count in range(1000):
        text = NEEDLE + FILLER * count
        messages = [[{"role": "user", "content": f"{text}\n\n{q}"}] for q in QUESTIONS]
        chats = [llm.tokenizer.apply_chat_template(one) for one in messages]
        if len(chats[0]) > 64 * TEXT_BLOCKS + 20:
            return chats
    raise AssertionError("the tokenizer makes no tokens")


def test_questions_about_one_text_in_fp8_caches(fp8: LLM) -> None:
    """The text is shared, loses its last block to another prompt, and is completed again."""
    engine, chats = fp8._open_engine(), chats_about_a_text(fp8)
    expected = computed_whole(engine, chats, SHORT, LEAST_LEAD["fp8_ds_mla"])

    def ask() -> list[int]:
        outputs = [fp8.generate(chat, SHORT)[0] for chat in chats]
        assert all(e.agrees(o.token_ids) for e, o in zip(expected, outputs, strict=True))
        return [output.num_cached_tokens // 64 for output in outputs]

    assert ask() == [TEXT_BLOCKS, TEXT_BLOCKS]
    other = [7 + i % 300 for i in range(64 * (TEXT_BLOCKS + 2) - 10)]
    assert fp8.generate(other, replace(SHORT, max_tokens=1))[0].num_cached_tokens == 0
    assert ask() == [TEXT_BLOCKS - 1, TEXT_BLOCKS]
