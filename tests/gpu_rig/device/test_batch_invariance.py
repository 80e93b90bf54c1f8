"""FD_DSA_BATCH_INVARIANT=1 on a device: a request's tokens and their log-probabilities do not
depend on company, chunks, prefix hits, preemption or graphs, to the bit.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import demo_model_path
from tests.gpu_rig import Rig
from tests.gpu_rig.device.test_formats import FP8, folder_of
from tests.runner.tiny import GLM, V32

pytestmark = [
    pytest.mark.gpu_rig,
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.usefixtures("one_order"),
]

VOCAB = 4096
# the first requests grow by more blocks than were kept for them, so that some lose theirs
NUM_LONG, LONG = 8, 160
# widths that the kernels for tensor cores take; a selection that most prompts outgrow
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_head_dim": 128,
    "index_topk": 96,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
# of the interpreter, which is slow
NARROW: dict[str, Any] = WIDTHS | {
    "hidden_size": 128,
    "intermediate_size": 128,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "index_topk": 8,
}
# what is asked for at once, and how the engine is made
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {"max_num_seqs": 1}),
    "eager": (64, {"enforce_eager": True}),
    "graphs": (64, {"cudagraph_capture_sizes": (1, 2, 4, 8, 16, 32, 64)}),
    "two": (2, {"max_num_seqs": 2, "enforce_eager": True}),
    "seven": (7, {"max_num_seqs": 7, "cudagraph_capture_sizes": (1, 4, 7)}),
    "short chunks": (64, {"max_num_batched_tokens": 80}),
    "preemption": (64, {"num_gpu_blocks_override": 13, "max_num_batched_tokens": 128}),
    "prefix hits": (64, {"enable_prefix_caching": True}),
}
FEW = {
    "alone": (1, {"max_num_seqs": 1}),
    "together": (3, {"max_num_batched_tokens": 7}),
}


def prompts_of(large: bool) -> list[list[int]]:
    """Prompts of one token up to several blocks, some that begin alike."""
    rng = np.random.default_rng(5)
    sizes = [1, 13, 10]
    if large:
        short, others = rng.integers(1, 40, NUM_LONG), rng.integers(1, 400, 63 - NUM_LONG)
        sizes = [*short.tolist(), *others.tolist(), 700]
    prompts = [rng.integers(2, VOCAB, size).tolist() for size in sizes]
    shared = rng.integers(2, VOCAB, 130 if large else 8).tolist()
    return [
        shared + p if i % 3 == 2 and (i >= NUM_LONG or not large) else p
        for i, p in enumerate(prompts)
    ]


def params_of(index: int, tokens: int) -> SamplingParams:
    """Greedy and sampled requests, with and without log-probabilities, of several lengths."""
    how: dict[str, Any] = {"temperature": 0.0}
    if index % 4 >= 2:
        how = {"temperature": 0.8, "top_p": 0.95, "seed": index}
    logprobs = 2 if index % 2 == 0 else None
    tokens = LONG if index < NUM_LONG and tokens > 2 else tokens + index % 3
    return SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=logprobs, **how)


def answers(folder: Path, device: str, batch: int, large: bool, **form: Any) -> tuple[list, Any]:
    """Tokens and log-probabilities of every prompt, `batch` of them at a time."""
    options: dict[str, Any] = {
        "max_num_seqs": 64 if large else 4,
        "max_num_batched_tokens": 2048 if large else 32,
        "max_model_len": 768 if large else 64,
        "num_gpu_blocks_override": 600 if large else 8,
        "enable_prefix_caching": False,
        "kv_cache_dtype": "fp8",
    }
    found = []
    prompts = prompts_of(large)
    requests = [(p, params_of(i, 16 if large else 2)) for i, p in enumerate(prompts)]
    with LLM(
        folder, tokenizer=demo_model_path(), device=device, dtype="bfloat16", **options | form
    ) as llm:
        runner = llm.engine.runner
        captured = form.get("cudagraph_capture_sizes")
        assert captured is None or runner.captured_sizes == captured
        for first in range(0, len(requests), batch):
            part = requests[first : first + batch]
            outputs = llm.generate([p for p, _ in part], [params for _, params in part])
            for output in outputs:
                scores = [t.score for t in output.logprobs or ()]
                found.append((output.token_ids, scores))
        stats = llm.engine.stats()
        runner.graphs = None
    gc.collect()
    return found, stats


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
@pytest.mark.parametrize("fields", [V32, GLM], ids=["v32", "glm"])
def test_answers_do_not_depend_on_company(
    rig: Rig, tmp_path: Path, fields: dict[str, Any], kind: str
) -> None:
    large = rig.is_real
    fields = fields | (WIDTHS if large else NARROW) | (FP8 if kind == "fp8" else {})
    folder = folder_of(tmp_path, fields, kind)
    wanted, seen = None, {}
    for name, (batch, form) in (FORMS if large else FEW).items():
        found, stats = answers(folder, rig.device, batch, large, **form)
        wanted = wanted or found
        assert found == wanted, name
        seen[name] = stats
    if large:
        assert seen["preemption"].num_preemptions > 0
        assert seen["prefix hits"].prefix_cache_hits > 0
