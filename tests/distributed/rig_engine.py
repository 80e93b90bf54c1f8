"""An engine on some GPUs, by the test plug-in: `rig_engine FOLDER SIZE CASE [CASE ...]`.

Writes what it answers to FOLDER/<SIZE>-<CASE>.json. One GPU answers freely, and says what float32
makes of its answers. Several follow the answers of one, which are in the folder: where they choose
another token, they go on from that of the one, so they choose at every place of every answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.demo.samples import LEADING_PROMPTS, PROSE

CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "drafts": {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}},
    # steps of a long prompt have 2,048 tokens, which two ranks divide
    "v4": {"max_model_len": 4096, "max_num_batched_tokens": 2048, "block_size": 256},
}
QUESTIONS = ("What is 7 + 5?", "Tell me a story about a dog.", "What is the opposite of big?")
MAX_TOKENS, NUM_TOP, LONG_PROMPT = 48, 8, 3000
Place = tuple[int, dict[int, float]]
"""A token that was chosen, and the log-probabilities of the likeliest ones."""


def fp8_folder(folder: Path) -> Path:
    """A small random model in block FP8, with the vocabulary of the demo model's tokenizer.

    Its embeddings are large beside what the layers add. Else rounding decides: with the attention's
    results rounded in another way, FP8 codes, then experts and at last the best log-probability of
    a prompt of one GPU are others, by up to one nat.
    """
    from safetensors.torch import load, save_file

    from benchmarks._gpu_engine_model import FP8, WIDTHS
    from benchmarks.real_widths import weights, write_checkpoint
    from fd_dsa.config import demo_model_path

    if folder.exists():
        return folder
    demo = json.loads((demo_model_path() / "config.json").read_text())
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 1024)
    sizes |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 16}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 512}
    sizes |= {"vocab_size": demo["vocab_size"], "max_position_embeddings": 4096}
    folder.mkdir()
    config = WIDTHS | sizes | {"rope_scaling": None, "quantization_config": FP8}
    write_checkpoint(folder, config, weights(config, "cpu"))
    [shard] = folder.glob("*.safetensors")
    tensors = load(shard.read_bytes())
    tensors["model.embed_tokens.weight"] *= 4
    save_file(tensors, shard)
    return folder


def v4_folder(folder: Path) -> Path:
    """A small random DeepSeek-V4 in the formats of its release, with that vocabulary, too."""
    from benchmarks._v4_checkpoint import weights
    from benchmarks._v4_gpu_model import V4Shape, fields_of
    from benchmarks.real_widths import write_checkpoint
    from fd_dsa.config import demo_model_path

    if folder.exists():
        return folder
    demo = json.loads((demo_model_path() / "config.json").read_text())
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 256, "num_attention_heads": 16}
    sizes |= {"q_lora_rank": 256, "o_groups": 8, "o_lora_rank": 128, "index_topk": 64}
    sizes |= {"vocab_size": demo["vocab_size"], "max_position_embeddings": 8192}
    sizes |= {"num_nextn_predict_layers": 0}
    folder.mkdir()
    config = fields_of(V4Shape(4, 16)) | sizes
    write_checkpoint(folder, config, weights(config, "cpu"))
    return folder


def served(folder: Path, case: str) -> dict[str, Any]:
    """Return the arguments of a case's engine.

    Args:
        folder: the place of checkpoints, in which that of the case may be already.
    """
    from fd_dsa.config import demo_model_path

    made = {"fp8": fp8_folder, "v4": v4_folder}
    model = made[case](folder / case) if case in made else demo_model_path()
    sizes = {"max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    sizes |= {"num_gpu_blocks_override": 160, "cudagraph_capture_sizes": (1, 4, 8)}
    common = {"model": model, "tokenizer": demo_model_path(), "speculative_config": "none"}
    return common | sizes | CASES[case]


def prompts_of(llm: Any, case: str) -> list[list[int]]:
    """Token ids of texts, one of them longer than what the demo model selects, and of chats.

    DeepSeek-V4 gets a text of several steps in addition.
    """
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [llm.tokenizer.encode(text) for text in LEADING_PROMPTS]
    if case == "v4":
        texts.append((llm.tokenizer.encode(PROSE) * 100)[:LONG_PROMPT])
    return texts + [llm.tokenizer.apply_chat_template(chat) for chat in chats]


def follow(
    llm: Any, prompts: list[list[int]], answers: list[list[int]] | None
) -> list[list[Place]]:
    """Return the choice of an engine at each place of each answer.

    Args:
        answers: tokens that it goes on from where it chooses others; None: it does so from its own.
    """
    from fd_dsa import SamplingParams

    found: list[list[Place]] = [[] for _ in prompts]
    while open_ones := [i for i, one in enumerate(found) if len(one) < MAX_TOKENS]:
        given = [prompts[i] + (answers[i][: len(found[i])] if answers else []) for i in open_ones]
        most = [MAX_TOKENS - len(found[i]) for i in open_ones]
        common: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "logprobs": NUM_TOP}
        params = [SamplingParams(max_tokens=number, **common) for number in most]
        for i, output in zip(open_ones, llm.generate(given, params), strict=True):
            for token, scored in zip(output.token_ids, output.logprobs, strict=True):
                found[i].append((token, dict(scored.score.top)))
                if answers and token != answers[i][len(found[i]) - 1]:
                    break
    return found


def acceptance(llm: Any, prompts: list[list[int]]) -> float:
    """Return the acceptance rate of drafts in steps that a device samples."""
    from fd_dsa import SamplingParams

    before = llm.stats()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    after = llm.stats()
    num_drafts = after.num_draft_tokens - before.num_draft_tokens
    accepted: int = after.num_accepted_tokens - before.num_accepted_tokens
    return accepted / max(num_drafts, 1)


def exact_scores(
    model: Path, prompts: list[list[int]], tokens: list[list[int]]
) -> list[list[float]]:
    """Log-probability of each token of each answer on the CPU, in float32."""
    from fd_dsa import LLM, SamplingParams
    from fd_dsa.config import demo_model_path

    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    whole = [prompt + one for prompt, one in zip(prompts, tokens, strict=True)]
    longest = max(1024, *(len(ids) + 1 for ids in whole))
    with LLM(model, device="cpu", tokenizer=demo_model_path(), max_model_len=longest) as llm:
        outputs = llm.generate(whole, params)
    return [[t.score.logprob for t in one.prompt_logprobs[-MAX_TOKENS:]] for one in outputs]


def main(folder: Path, size: int, cases: list[str], form: str = "real") -> None:
    """Answer the prompts of each case, one engine after another."""
    from tests.gpu_rig import load

    device = load(form).device
    from custom_ops.build_library import build_library
    from fd_dsa import LLM, custom_ops
    from fd_dsa.engine.draft_state import DraftCosts
    from fd_dsa.startup import build
    from fd_dsa.startup.ranks import Ranks

    # fixed costs, so that every request drafts on any machine
    build.measure_step_costs = lambda *_: DraftCosts({1: [1.0, 1.1, 1.2, 1.3]})  # type: ignore[assignment]
    if form == "real":
        custom_ops.use_library(build_library())
    Ranks.COMMAND = (sys.executable, "-m", "tests.distributed.rig_rank")
    for case in cases:
        arguments = served(folder, case)
        one = folder / f"1-{case}.json"
        answers = json.loads(one.read_text())["tokens"] if size > 1 else None
        with LLM(device=device, tensor_parallel_size=size, **arguments) as llm:
            prompts = prompts_of(llm, case)
            places = follow(llm, prompts, answers)
            rate = acceptance(llm, prompts) if case == "drafts" else 0.0
            found: dict[str, Any] = {"acceptance": rate}
        found["tokens"] = [[token for token, _ in one] for one in places]
        found["tops"] = [[list(top.items()) for _, top in one] for one in places]
        if size == 1:
            found["exact"] = exact_scores(arguments["model"], prompts, found["tokens"])
        (folder / f"{size}-{case}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
