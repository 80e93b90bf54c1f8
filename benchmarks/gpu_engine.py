"""The embedded engine on one GPU beside vLLM: DeepSeek-V3.2's widths, few layers, random weights.

    python -m benchmarks.gpu_engine --rig               # ours, on the test plug-in
    python -m benchmarks.gpu_engine --rig --peer DIR    # then vLLM on the same GPU

Token-id prompts of one seed, greedy, no end before the last token. DIR has a `run.sh` that answers
`bench --out FILE.jsonl --scenarios ...` with a record for each case. Writes
benchmarks/results/gpu_engine.json: a ratio above 1 means that ours is better; the floor is what
must be read of weights and caches at the copy rate, or multiplied at the rate of the tensor cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._harness import RESULTS, Worker, environment, write_json

CAPTURED = (1, 2, 4, 8, 16, 32, 64, 128)
CONFIG: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "max_model_len": 33024,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 8192,
    "cudagraph_capture_sizes": CAPTURED,
}
LAYERS, DENSE_LAYERS = 7, 1
WIDTHS: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


class Case(NamedTuple):
    """What is timed, and how often; the figure of several runs is the median."""

    target: str
    kind: str
    batch: int
    prompt: int
    new: int
    runs: int = 2


CASES = {
    "decode-1x4k": Case("P21", "decode", 1, 4096, 128, 5),
    "decode-8x4k": Case("P21", "decode", 8, 4096, 128),
    "decode-32x4k": Case("P21", "decode", 32, 4096, 128),
    "decode-128x4k": Case("P21", "decode", 128, 4096, 64),
    "decode-1x32k": Case("P21", "decode", 1, 32768, 128),
    "decode-32x32k": Case("P21", "decode", 32, 32768, 64, 1),
    "prefill-1x8k": Case("P22", "prefill", 1, 8192, 1),
    "prefill-8x4k": Case("P22", "prefill", 8, 4096, 1),
    "prefill-1x32k": Case("P22", "prefill", 1, 32768, 1),
    "prefill-4x2k": Case("P22", "prefill", 4, 2048, 1),
    "mixed-64x2k": Case("P23", "mixed", 64, 2048, 128),
}
# figure of a kind, its unit, and whether less is better
FIGURES = {
    "decode": ("tpot_ms", "ms a token", True),
    "prefill": ("tok_s", "prompt tokens/s", False),
    "mixed": ("tok_s", "tokens/s", False),
}


def write_model(folder: Path, layers: int = LAYERS, dense: int = DENSE_LAYERS) -> Path:
    """A folder with the config.json of the model."""
    config = WIDTHS | {"num_hidden_layers": layers, "first_k_dense_replace": dense}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    return folder


def measure(engine: Worker, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The figure of each case, as soon as it is there."""
    engine.call(op="decode", batch=2, prompt=4096, new=16)
    for name in names:
        case, values = CASES[name], []
        for _ in range(case.runs):
            sizes = {"batch": case.batch, "prompt": case.prompt, "new": case.new}
            values.append(engine.call(op=case.kind, **sizes)[FIGURES[case.kind][0]])
        yield name, sorted(values)[len(values) // 2]


def peer_values(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """vLLM's figures, by its own process."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
        command = ["bash", str(folder / "run.sh"), "bench", "--out", out.name]
        command += ["--capture", ",".join(map(str, CAPTURED))]
        command += ["--scenarios", ",".join(["warm", *names])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in Path(out.name).read_text().splitlines()]
    found = {record["name"]: record for record in records}
    return {name: found[name][FIGURES[CASES[name].kind][0]] for name in names if name in found}


def entry(name: str, ours: float, peer: float | None) -> dict[str, Any]:
    """One case of the result."""
    case = CASES[name]
    _, unit, less_is_better = FIGURES[case.kind]
    ratio = None
    if peer is not None:
        ratio = peer / ours if less_is_better else ours / peer
    return {
        "case": name,
        "target": case.target,
        "peer": "vLLM",
        "peer_value": peer,
        "ours_value": ours,
        "unit": unit,
        "ratio": ratio,
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def show_profile(profile: Mapping[str, Any]) -> None:
    """The largest kernels of a step."""
    print(
        f"  profile: busy {profile['busy_us']:.0f} us of {profile['wall_us']:.0f}, "
        f"{profile['launches']:.0f} launches"
    )
    for name, us, launches in profile["kernels"][:40]:
        print(f"    {us:9.1f} us  {launches:6.1f}  {name}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rig", action="store_true", help="Paddle's CPU wheel and the test plug-in"
    )
    parser.add_argument("--peer", type=Path, help="folder with vLLM's run.sh")
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument("--profile", default="1,32", help="rows of decode steps that are profiled")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    names = [name for name in args.cases.split(",") if name]
    result: dict[str, Any] = {"name": "gpu_engine", "env": environment(), "cases": []}
    result |= {"tier": "T1p" if args.rig else "T2", "layers": args.layers, "profiles": {}}
    path = args.out / "gpu_engine.json"
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_model(Path(folder), args.layers))
        target = "benchmarks.workers.gpu_engine:Engine"
        with Worker(target, model=model, rig=args.rig, config=CONFIG) as engine:
            result["start"] = engine.call(op="start_up")
            print(result["start"], flush=True)
            for name, ours in measure(engine, names):
                print(f"{name:<16} {ours:10.2f} {FIGURES[CASES[name].kind][1]}", flush=True)
                result["cases"].append(entry(name, ours, None))
                write_json(path, result)
            for rows in filter(None, args.profile.split(",")):
                profile = engine.call(op="profile", batch=int(rows), prompt=4096, steps=8)
                result["profiles"][rows] = profile
                show_profile(profile)
                write_json(path, result)
    if args.peer:
        peer = peer_values(args.peer, names)
        result["cases"] = [
            entry(case["case"], case["ours_value"], peer.get(case["case"]))
            for case in result["cases"]
        ]
        write_json(path, result)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
