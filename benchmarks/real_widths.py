"""Two layers of DeepSeek-V3.2 at their real widths, from one folder, here and in vLLM.

    python -m benchmarks.real_widths --rig --peer DIR    # a GPU with 40 GB, 20 GB in --folder
    python -m benchmarks.real_widths --dry               # small widths on the CPU, without vLLM

A dense layer and one with 256 experts, random weights in FP8 whose scales differ from block to
block. vLLM continues prompts greedily; this engine is given the same tokens and must find the same
token likeliest wherever vLLM's lead is clear, first as the end of a prompt for each of them, then
by decoding until the two differ. DIR has a `run.sh` that runs `python SCRIPT ...` with vLLM's
packages. Writes benchmarks/results/real_widths.json; fails where a clear lead is lost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS, Worker, environment, random_prompts, write_json
from benchmarks.gpu_engine import FP8, WIDTHS
from benchmarks.once_per_step import SMALL
from benchmarks.workers.vllm_logprobs import NEW_TOKENS, TOP

PROMPTS = (100, 3000, 9000)
# of log-probabilities, nats: what two right engines may differ by, and a lead that both must see
CLEAR = 0.1
SHARD_BYTES = 4 << 30


def weights(config: dict[str, Any], device: str) -> Iterator[tuple[str, Any]]:
    """Names and random tensors of the checkpoint."""
    import torch

    from fd_dsa.models.config import ModelConfig
    from fd_dsa.models.expected_tensors import expected_tensors

    torch.manual_seed(0)
    shapes = expected_tensors(ModelConfig.from_dict(config))
    for name, one in shapes.items():
        noise = torch.randn(one.shape, device=device, dtype=torch.bfloat16)
        if one.quantisable:
            rows, columns = one.shape
            blocks = (-(-rows // 128), -(-columns // 128))
            scales = torch.randint(-5, 3, blocks, device=device).float().exp2()
            yield f"{name}_scale_inv", scales * 2.0 ** round(-0.5 * np.log2(columns))
            yield name, noise.to(torch.float8_e4m3fn)
        elif "norm" in name and name.endswith("weight"):
            yield name, 1 + 0.1 * noise
        elif name.endswith("bias"):
            yield name, 0.1 * (noise.float() if "gate" in name else noise)
        elif "embed" in name:
            yield name, noise
        else:
            gain = 3.0 if name == "lm_head.weight" else 1.0
            yield name, noise * (gain * one.shape[-1] ** -0.5)


def write_checkpoint(folder: Path, config: dict[str, Any], device: str) -> int:
    """Write config.json and the weights in shards; their bytes."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Any]] = [{}]
    index: dict[str, str] = {}

    def save() -> int:
        """Write the last shard; its bytes."""
        save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors")
        size = sum(tensor.nbytes for tensor in shards[-1].values())
        shards[-1].clear()
        return size

    total = 0
    for name, tensor in weights(config, device):
        if sum(one.nbytes for one in shards[-1].values()) > SHARD_BYTES:
            total += save()
            shards.append({})
        shards[-1][name] = tensor.contiguous().cpu()
        index[name] = f"model-{len(shards):05d}.safetensors"
    total += save()
    entries = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(entries))
    return total


def compare(tops: Sequence[Any], ours: Sequence[Any]) -> dict[str, Any]:
    """How the likeliest tokens of two engines agree.

    Args:
        tops: of the peer, for each position [[token, logprob], ...], likeliest first.
        ours: the same.
    """
    same, clear, lost, differences = 0, 0, 0, []
    for theirs, mine in zip(tops, ours, strict=True):
        theirs, known = sorted(theirs, key=lambda pair: -pair[1]), dict(mine)
        equal = theirs[0][0] == mine[0][0]
        is_clear = theirs[0][1] - theirs[1][1] >= CLEAR
        same, clear, lost = same + equal, clear + is_clear, lost + (is_clear and not equal)
        differences += [abs(p - known[token]) for token, p in theirs if token in known]
    return {
        "positions": len(tops),
        "same": same,
        "clear": clear,
        "clear_lost": lost,
        "mean_difference": float(np.mean(differences)),
        "largest_difference": float(np.max(differences)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 1 where a clear lead is lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rig", action="store_true", help="Paddle's CPU wheel and the test plug-in"
    )
    parser.add_argument("--dry", action="store_true", help="small widths on the CPU, no peer")
    parser.add_argument("--peer", type=Path, help="folder with vLLM's run.sh")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    config = WIDTHS | {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    config |= {"quantization_config": FP8} | (SMALL if args.dry else {})
    lengths = (20, 100, 200) if args.dry else PROMPTS
    prompts = [random_prompts(1, n, config["vocab_size"], n)[0] for n in lengths]
    result: dict[str, Any] = {"name": "real_widths", "env": environment(), "cases": []}
    result["tier"] = "dry" if args.dry else "T1p" if args.rig else "T2"
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write_checkpoint(folder, config, "cpu" if args.dry else "cuda")
        print(f"{size / 1e9:.1f} GB written", flush=True)
        answers = None
        if args.peer:
            (folder / "prompts.json").write_text(json.dumps(prompts))
            script = Path(__file__).parent / "workers" / "vllm_logprobs.py"
            files = [str(folder / "prompts.json"), str(folder / "peer.json")]
            command = ["bash", str(args.peer / "run.sh"), "python", str(script), name, *files]
            subprocess.run(command, check=True)
            answers = json.loads((folder / "peer.json").read_text())
        begin = time.perf_counter()
        target = "benchmarks.workers.real_widths:Engine"
        device = "cpu" if args.dry else "gpu"
        with Worker(target, model=name, rig=args.rig, device=device) as engine:
            engine.call(op="decoded", prompts=[prompts[0][:10]], new=1, top=1)
            result["start_s"] = time.perf_counter() - begin
            result["weights_bytes"] = size
            print(f"first token after {result['start_s']:.1f} s", flush=True)
            if answers is None:
                answers = engine.call(op="decoded", prompts=prompts, new=NEW_TOKENS, top=TOP)
            for prompt, answer in zip(prompts, answers, strict=True):
                ids, tops = answer["token_ids"], answer["top"]
                read = engine.call(op="read", prompt=prompt, token_ids=ids, top=TOP)
                [own] = engine.call(op="decoded", prompts=[prompt], new=len(ids), top=TOP)
                pairs = enumerate(zip(own["token_ids"], ids, strict=True))
                equal = next((i + 1 for i, (a, b) in pairs if a != b), len(ids))
                for how, mine, count in (("prompts", read, None), ("decode", own["top"], equal)):
                    case = {"case": how, "prompt": len(prompt)}
                    case |= compare(tops[:count], mine[:count])
                    result["cases"].append(case)
                    print(case, flush=True)
    write_json(args.out / "real_widths.json", result)
    return int(any(case["clear_lost"] for case in result["cases"]))


if __name__ == "__main__":
    sys.exit(main())
