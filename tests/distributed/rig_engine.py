"""An engine on some GPUs, by the test plug-in: `rig_engine FOLDER SIZE CASE [CASE ...]`.

Writes what it answers to FOLDER/<SIZE>-<CASE>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.demo.samples import LEADING_PROMPTS

CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
}


def fp8_folder(folder: Path) -> Path:
    """A small random model in block FP8, with the vocabulary of the demo model's tokenizer.

    Its embeddings are large beside what the layers add. Else rounding decides: with the attention's
    results rounded in another way, FP8 codes, then experts and at last the best log-probability of
    a prompt of one GPU are others, by up to one nat.
    """
    from safetensors.torch import load, save_file

    from benchmarks._gpu_engine_model import FP8, WIDTHS
    from benchmarks.real_widths import write_checkpoint
    from fd_dsa.config import demo_model_path

    demo = json.loads((demo_model_path() / "config.json").read_text())
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 1024)
    sizes |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 16}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 512}
    sizes |= {"vocab_size": demo["vocab_size"], "max_position_embeddings": 4096}
    folder.mkdir(exist_ok=True)
    config = WIDTHS | sizes | {"rope_scaling": None, "quantization_config": FP8}
    write_checkpoint(folder, config, "cpu")
    [shard] = folder.glob("*.safetensors")
    tensors = load(shard.read_bytes())
    tensors["model.embed_tokens.weight"] *= 4
    save_file(tensors, shard)
    return folder


def best_two(token: Any) -> list[float]:
    """Log-probabilities of the best token at a place, and of the next one."""
    return [logprob for _, logprob in token.score.top[:2]]


def main(folder: Path, size: int, cases: list[str], form: str = "real") -> None:
    """Answer the prompts of each case, one engine after another."""
    from tests.gpu_rig import load

    device = load(form).device
    from custom_ops.build_library import build_library
    from fd_dsa import LLM, SamplingParams, custom_ops
    from fd_dsa.config import demo_model_path
    from fd_dsa.engine.ranks import Ranks

    if form == "real":
        custom_ops.use_library(build_library())
    Ranks.COMMAND = (sys.executable, "-m", "tests.distributed.rig_rank")
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=2)
    for case in cases:
        model = fp8_folder(folder / "fp8") if case == "fp8" else demo_model_path()
        options = {"tokenizer": demo_model_path(), "max_model_len": 1024, "max_num_seqs": 8}
        options |= {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 160} | CASES[case]
        with LLM(model, device=device, tensor_parallel_size=size, **options) as llm:
            outputs = llm.generate(LEADING_PROMPTS, params)
        answers = [
            {"tokens": one.token_ids, "best": [best_two(t) for t in one.logprobs or ()]}
            for one in outputs
        ]
        (folder / f"{size}-{case}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
