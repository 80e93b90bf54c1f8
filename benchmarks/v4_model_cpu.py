"""DeepSeek-V4 on a CPU against Hugging Face `generate`: same weights, threads and lengths.

    python -m benchmarks.v4_model_cpu            # all; about 10 minutes on 2 idle cores
    python -m benchmarks.v4_model_cpu --runs 3   # fewer rounds, for a busy machine

Two random models, a tiny and a middle one, whose layers are of all kinds. tokens/s counts new
tokens over the whole call, prefill included. Both sides generate greedily and never stop early;
each has a process of its own, and they take turns. Writes benchmarks/results/v4_model_cpu.json.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._harness import Worker, parser_of, save
from benchmarks.engine_cpu import compare
from tests.v4_model.cases import CASES, CSA, HCA, WINDOW, Case

_MIDDLE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "layer_types": [WINDOW, WINDOW, *(CSA, HCA) * 3],
    "compress_rates": {CSA: 4, HCA: 128},
    "sliding_window": 128,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 256,
    "o_groups": 4,
    "o_lora_rank": 128,
    "index_head_dim": 64,
    "index_topk": 64,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 2048,
}
# model and tokens of its cache blocks
MODELS = {"tiny": (CASES["mixed"], 16), "middle": (Case("middle", _MIDDLE, seed=1), 128)}
# (concurrent requests, prompt tokens, new tokens)
REQUESTS = ((1, 64, 32), (16, 64, 32))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Returns 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=9, help="rounds that count, of each case")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"load_average_before": os.getloadavg()[0], "models": {}}
    for name, (case, block_size) in MODELS.items():
        print(f"{name}: {case.config['num_hidden_layers']} layers", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            case.write_served(Path(folder))
            fields = {"model": folder, "block_size": block_size, "max_num_seqs": 16}
            with (
                Worker("benchmarks.workers.ours:Engine", **fields) as ours,
                Worker("benchmarks.workers.hugging_face:Model", model=folder) as baseline,
            ):
                sides = {"candidate": ours, "baseline": baseline}
                rows = compare(sides, REQUESTS, args.runs)
        result["models"][name] = {"config": case.config, "cases": rows}
    save("v4_model_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
