"""Two layers of DeepSeek-V3.2 at their real widths, here, in vLLM and exactly.

    python -m benchmarks.real_widths --rig --peer DIR    # a GPU with 60 GB, 20 GB in --folder
    python -m benchmarks.real_widths --rig --peer DIR --v4    # the first layers of DeepSeek-V4
    python -m benchmarks.real_widths --dry               # small widths on the CPU, without vLLM

The model has a dense layer and one with 256 experts. Its weights are random, in FP8, with scales
that differ from block to block. All engines read one folder. vLLM and this engine continue prompts
greedily. This engine also reads vLLM's tokens, each as the end of a prompt. transformers computes
both continuations in float32 from the stored weights. A layer adds little to its input: otherwise
experts that rounding selects would make two right engines differ as much as a wrong one does.

DeepSeek-V4 has its first four layers, of all kinds, with 64 experts in FP4. There is no exact
reference: transformers has no rounding of the indexer. So both engines are compared with each
other.

The engine starts twice, the first time with kernels to compile. DIR has a `run.sh` that runs
`python SCRIPT ...` with vLLM's packages. Writes benchmarks/results/real_widths.json, for V4
real_widths_v4.json. Fails if we are clearly further from the exact log-probabilities than vLLM, or
lose a clearly larger share of leads. With V4 it fails if tokens differ where vLLM's lead is clear,
or if log-probabilities differ by more than a bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._gpu_engine_model import FP8, SMALL, WIDTHS
from benchmarks._harness import (
    Worker,
    random_prompts,
    rig_parser,
    rig_result,
    run_peer,
    write_result,
)
from benchmarks._v4_checkpoint import weights as v4_weights
from benchmarks._v4_gpu_model import WIDTHS as WIDTHS_V4
from benchmarks._v4_gpu_model import V4Shape, fields_of
from benchmarks.v4_gpu import CONFIG as V4_CONFIG
from benchmarks.workers.vllm_logprobs import NEW_TOKENS, TOP
from fd_dsa.models.registry import config_from_dict

PROMPTS = (100, 3000, 9000)
# scores of longer prompts in transformers do not fit
MOST_EXACT = 4096
# lead of the best log-probability that a right engine sees, nats
CLEAR = 0.3
# largest multiple of the peer's mean distance from the exact values, and of its lost share
MOST_DISTANCE = 1.25
# between two engines: share of the peer's clear leads with another token, and mean distance, nats
MOST_DIFFERENT, MOST_APART = 0.05, 0.1
# projections at the end of a layer, and the power of two that scales them down
_ADDING, _LESS = ("o_proj.weight", "down_proj.weight"), 3
SHARD_BYTES = 4 << 30
# fields of DeepSeek-V4 that a dry run has, too
FORMATS = "quantization_config", "expert_dtype"


def weights(config: dict[str, Any], device: str) -> Iterator[tuple[str, Any]]:
    """Yield names and random tensors of the checkpoint."""
    import torch

    from fd_dsa.models.expected_tensors import expected_tensors

    torch.manual_seed(0)
    shapes = expected_tensors(config_from_dict(config))
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


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: Iterable[tuple[str, Any]]
) -> int:
    """Write config.json and the weights in shards. Returns their bytes."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Any]] = [{}]
    index: dict[str, str] = {}

    def save() -> int:
        """Write the last shard. Returns its bytes."""
        save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors")
        size = sum(tensor.nbytes for tensor in shards[-1].values())
        shards[-1].clear()
        return size

    total = 0
    for name, tensor in tensors:
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
    folder: Path, prompts: Sequence[list[int]], answers: Sequence[list[int]], device: str
) -> list[np.ndarray | None]:
    """Return transformers' log-probabilities of each answer, if they fit.

    Returns:
        float32 [tokens, vocab_size] or None for each answer.
    """
    given = [(prompt + ids[:-1], len(ids)) for prompt, ids in zip(prompts, answers, strict=True)]
    fit = [len(sequence) <= MOST_EXACT for sequence, _ in given]
    sequences = [one for one, fits in zip(given, fit, strict=True) if fits]
    (folder / "sequences.json").write_text(json.dumps(sequences))
    script = Path(__file__).parent / "workers" / "exact_logprobs.py"
    files = [folder, folder / "sequences.json", folder]
    subprocess.run([sys.executable, script, *files, device], check=True)
    found = iter(np.load(folder / f"{index}.npy") for index in range(len(sequences)))
    return [next(found) if fits else None for fits in fit]


def distance(tops: Sequence[Any], exact: np.ndarray) -> dict[str, Any]:
    """Compare the likeliest tokens of an engine with exact log-probabilities.

    Args:
        tops: for each position [[token, logprob], ...].
        exact: float32 [positions, vocab_size].
    """
    best = np.sort(exact, axis=-1)[:, -2:]
    is_clear = best[:, 1] - best[:, 0] >= CLEAR
    chosen = np.array([max(top, key=lambda pair: pair[1])[0] for top in tops])
    errors = [abs(p - row[t]) for top, row in zip(tops, exact, strict=True) for t, p in top]
    return {
        "clear": int(is_clear.sum()),
        "lost": int((is_clear & (chosen != exact.argmax(-1))).sum()),
        "error": float(np.mean(errors)),
    }


def mean_difference(ours: Sequence[Any], peer: Sequence[Any]) -> float:
    """Return the mean difference of two engines' log-probabilities after equal tokens, nats."""
    pairs = [(dict(a), dict(b)) for a, b in zip(ours, peer, strict=True)]
    return float(np.mean([abs(a[t] - b[t]) for a, b in pairs for t in a.keys() & b.keys()]))


def compare(
    ours: Sequence[Any], peer: Sequence[Any], exact: Sequence[np.ndarray | None]
) -> dict[str, Any]:
    """Return the distances of both sides from the exact values, if those are known."""
    case: dict[str, Any] = {"positions": len(ours)}
    for side, tops, scores in zip(("ours", "peer"), (ours, peer), exact, strict=True):
        if scores is not None:
            found = distance(tops, scores)
            case |= {f"{side}_{key}": value for key, value in found.items()}
    return case


def agreement(ours: Sequence[Any], peer: Sequence[Any]) -> dict[str, Any]:
    """Compare the best tokens of two engines where the peer's lead is clear."""
    clear = different = 0
    for own, other in zip(ours, peer, strict=True):
        (best, score), (_, second), *_ = sorted(other, key=lambda pair: -pair[1])
        if score - second >= CLEAR:
            clear += 1
            different += max(own, key=lambda pair: pair[1])[0] != best
    return {"peer_leads": clear, "different": different}


def is_worse(case: dict[str, Any]) -> bool:
    """Return True if we are further from exact values than the peer, or lose more leads.

    Without exact values the peer's are those to agree with.
    """
    if "different" in case:
        lost = case["different"] > MOST_DIFFERENT * case["peer_leads"]
        return bool(lost or case["mean_difference"] > MOST_APART)
    if "ours_error" not in case:
        return False
    lost = [case[f"{side}_lost"] / max(case[f"{side}_clear"], 1) for side in ("ours", "peer")]
    return bool(
        case["ours_error"] > MOST_DISTANCE * case["peer_error"] or lost[0] > MOST_DISTANCE * lost[1]
    )


@contextlib.contextmanager
def started(model: str, **options: Any) -> Iterator[tuple[Worker, float]]:
    """Yield an engine after its first token, and the seconds until then."""
    begin = time.perf_counter()
    target = "benchmarks.workers.real_widths:Engine"
    with Worker(target, model=model, **options) as engine:
        engine.call(op="decoded", prompts=[[1] * 10], new=1, top=1)
        seconds = time.perf_counter() - begin
        print(f"first token after {seconds:.1f} s", flush=True)
        yield engine, seconds


def model_of(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json of the model, and options of its engine."""
    options: dict[str, Any] = {"rig": args.rig, "device": "cpu" if args.dry else "gpu"}
    if not args.v4:
        config = WIDTHS | {"num_hidden_layers": 2, "first_k_dense_replace": 1}
        return config | {"quantization_config": FP8} | (SMALL if args.dry else {}), options
    config = fields_of(V4Shape(4, 64), args.dry) | {"num_nextn_predict_layers": 0}
    options["block_size"] = V4_CONFIG["block_size"]
    if args.dry:
        config |= {"n_routed_experts": 8} | {name: WIDTHS_V4[name] for name in FORMATS}
        options["kv_cache_dtype"] = "auto"
    return config, options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 1 if we are worse than the peer."""
    parser = rig_parser(__doc__)
    parser.add_argument("--peer", type=Path, help="folder with vLLM's run.sh")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--v4", action="store_true", help="DeepSeek-V4 in place of V3.2")
    args = parser.parse_args(argv)
    config, options = model_of(args)
    device = "cpu" if args.dry else "cuda"
    tensors = (v4_weights if args.v4 else weights)(config, device)
    lengths = (20, 100, 200) if args.dry else PROMPTS
    prompts = [random_prompts(1, n, config["vocab_size"], n)[0] for n in lengths]
    result = rig_result("real_widths" + "_v4" * args.v4, args)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write_checkpoint(folder, config, tensors)
        print(f"{size / 1e9:.1f} GB written", flush=True)
        answers = None
        if args.peer:
            (folder / "prompts.json").write_text(json.dumps(prompts))
            run_peer(
                args.peer, "vllm_logprobs.py", name, folder / "prompts.json", folder / "peer.json"
            )
            answers = json.loads((folder / "peer.json").read_text())
        # the first start compiles kernels
        with started(name, **options) as (_, result["first_start_s"]):
            pass
        with started(name, **options) as (engine, result["start_s"]):
            found = engine.call(op="decoded", prompts=prompts, new=NEW_TOKENS, top=TOP)
            answers = answers or found
            given = [answer["token_ids"] for answer in answers]
            read = [
                engine.call(op="read", prompt=prompt, token_ids=ids, top=TOP)
                for prompt, ids in zip(prompts, given, strict=True)
            ]
        result["weights_bytes"] = size
        own = [answer["token_ids"] for answer in found]
        exact: Sequence[np.ndarray | None] = [None] * (2 * len(prompts))
        if not args.v4:
            exact = exact_scores(folder, [*prompts, *prompts], [*own, *given], device)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        after_own, after_given = exact[index], exact[index + len(prompts)]
        peer, ours = answer["top"], found[index]["top"]
        case = {"case": "prompts", "prompt": len(prompt)}
        case |= compare(read[index], peer, (after_given, after_given))
        case["mean_difference"] = mean_difference(read[index], peer)
        if args.v4:
            case |= agreement(read[index], peer)
        result["cases"].append(case)
        if after_own is not None:
            case = {"case": "decode", "prompt": len(prompt)}
            result["cases"].append(case | compare(ours, peer, (after_own, after_given)))
    for case in result["cases"]:
        print(case, flush=True)
    write_result(args.out, result)
    return int(any(map(is_worse, result["cases"])))


if __name__ == "__main__":
    sys.exit(main())
