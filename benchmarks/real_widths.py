"""Two layers of DeepSeek-V3.2 at their real widths, from one folder, here, in vLLM and exactly.

    python -m benchmarks.real_widths --rig --peer DIR    # a GPU with 60 GB, 20 GB in --folder
    python -m benchmarks.real_widths --dry               # small widths on the CPU, without vLLM

A dense layer and one with 256 experts, random weights in FP8 whose scales differ from block to
block. vLLM continues prompts greedily; this engine is given the same tokens, first as the end of a
prompt for each of them, then by decoding until the two differ; and transformers computes both in
float32 from the weights as stored. What a layer adds is small beside what it adds to: experts that
rounding chooses would make two right engines differ as much as a wrong one does. DIR has a `run.sh`
that runs `python SCRIPT ...` with vLLM's packages. Writes benchmarks/results/real_widths.json;
fails where we are further from the exact log-probabilities than vLLM, or lose a clear lead there
that it sees.
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

from benchmarks._harness import (
    RESULTS,
    Worker,
    environment,
    random_prompts,
    run_peer,
    write_json,
)
from benchmarks.gpu_engine import FP8, WIDTHS
from benchmarks.once_per_step import SMALL
from benchmarks.workers.vllm_logprobs import NEW_TOKENS, TOP

PROMPTS = (100, 3000, 9000)
# transformers' scores of longer ones do not fit
MOST_EXACT = 4096
# of log-probabilities, nats: a lead that a right engine sees
CLEAR = 0.3
# of the peer's mean distance from what is exact, where enough positions show it
MOST_DISTANCE, LEAST_POSITIONS = 1.25, 32
# what a layer adds by, and the power of two by which that is less
_ADDING, _LESS = ("o_proj.weight", "down_proj.weight"), 3
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
            less = _LESS if name.endswith(_ADDING) else 0
            yield f"{name}_scale_inv", scales * 2.0 ** (round(-0.5 * np.log2(columns)) - less)
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


def exact_scores(
    folder: Path, prompts: Sequence[list[int]], answers: Sequence[Any], device: str
) -> list[np.ndarray | None]:
    """float32 [tokens, vocab_size] of each answer: transformers' log-probabilities, if they fit."""
    ids = [answer["token_ids"] for answer in answers]
    given = [[prompt + own[:-1], len(own)] for prompt, own in zip(prompts, ids, strict=True)]
    fit = [len(sequence) <= MOST_EXACT for sequence, _ in given]
    sequences = [one for one, fits in zip(given, fit, strict=True) if fits]
    (folder / "sequences.json").write_text(json.dumps(sequences))
    script = Path(__file__).parent / "workers" / "exact_logprobs.py"
    files = [folder, folder / "sequences.json", folder]
    subprocess.run([sys.executable, script, *files, device], check=True)
    found = iter(np.load(folder / f"{index}.npy") for index in range(len(sequences)))
    return [next(found) if fits else None for fits in fit]


def compare(sides: dict[str, Sequence[Any]], exact: np.ndarray | None) -> dict[str, Any]:
    """How the likeliest tokens of engines agree with each other and with what is exact.

    Args:
        sides: of "ours" and "peer", for each position [[token, logprob], ...].
        exact: float32 [positions, vocab_size].
    """
    pairs = [(dict(a), dict(b)) for a, b in zip(sides["ours"], sides["peer"], strict=True)]
    both = [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()]
    case: dict[str, Any] = {"positions": len(pairs), "mean_difference": float(np.mean(both))}
    if exact is None:
        return case
    best = np.sort(exact, axis=-1)[:, -2:]
    is_clear = best[:, 1] - best[:, 0] >= CLEAR
    case["clear"] = int(is_clear.sum())
    for side, tops in sides.items():
        chosen = np.array([max(top, key=lambda pair: pair[1])[0] for top in tops])
        errors = [abs(p - row[t]) for top, row in zip(tops, exact, strict=True) for t, p in top]
        case[f"{side}_lost"] = int((is_clear & (chosen != exact.argmax(-1))).sum())
        case[f"{side}_error"] = float(np.mean(errors))
    return case


def is_worse(case: dict[str, Any]) -> bool:
    """Whether we are further from what is exact than the peer, over enough positions."""
    if "clear" not in case or case["positions"] < LEAST_POSITIONS:
        return False
    further = case["ours_error"] > MOST_DISTANCE * case["peer_error"]
    return bool(further or case["ours_lost"] > case["peer_lost"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 1 where we are worse than the peer."""
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
            run_peer(
                args.peer, "vllm_logprobs.py", name, folder / "prompts.json", folder / "peer.json"
            )
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
            found = []
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = answer["token_ids"]
                read = engine.call(op="read", prompt=prompt, token_ids=ids, top=TOP)
                [own] = engine.call(op="decoded", prompts=[prompt], new=len(ids), top=TOP)
                found.append((read, own))
        exact = exact_scores(folder, prompts, answers, "cpu" if args.dry else "cuda")
    for prompt, answer, scores, (read, own) in zip(prompts, answers, exact, found, strict=True):
        pairs = enumerate(zip(own["token_ids"], answer["token_ids"], strict=True))
        equal = next((i + 1 for i, (a, b) in pairs if a != b), len(read))
        for how, mine, count in (("prompts", read, len(read)), ("decode", own["top"], equal)):
            sides = {"ours": mine[:count], "peer": answer["top"][:count]}
            case = {"case": how, "prompt": len(prompt)}
            case |= compare(sides, None if scores is None else scores[:count])
            result["cases"].append(case)
            print(case, flush=True)
    write_json(args.out / "real_widths.json", result)
    return int(any(map(is_worse, result["cases"])))


if __name__ == "__main__":
    sys.exit(main())
