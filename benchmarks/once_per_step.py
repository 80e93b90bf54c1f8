"""The gain of metadata once per step in a whole model: five layers of DeepSeek-V3.2 in bfloat16.

    python -m benchmarks.once_per_step --rig     # on the test plug-in
    python -m benchmarks.once_per_step --dry     # small widths on the CPU: shows that it runs
    python -m benchmarks.once_per_step --rig --layers 61 --experts 16      # FP8, fits 80 GB
    python -m benchmarks.once_per_step --rig --tensor-parallel-size 4      # a whole model: P31
    python -m benchmarks.once_per_step --rig --v4       # DeepSeek-V4 with half of its experts: V48

The first experiment is that of FastDeploy #7367: time per output token, captured and eager. The
other form makes the slots by two chains of operators in every layer. The second experiment is that
of #7598: prompts whose windows come from one launch a step. The other form makes them in every
layer by a loop over the requests, which waits for the device. A graph cannot hold such a loop.
`_operator_chains.py` has both other forms, and a worker adds them to this engine's layers.

The other form of DeepSeek-V4 makes the index arrays of a step in every layer, by the launches that
make them once. It has the model of `v4_gpu`.

Five layers have 256 experts. A model of `--layers` is in FP8. `--experts` removes experts, so that
the model fits; a token runs through eight in any case. On several GPUs the model has the shape of
DeepSeek-V3.2-REAP-345B in FP8, and only decode steps are timed. There only rank 0 does the other
form's work, and the others wait for it. Writes benchmarks/results/once_per_step.json. Its name ends
with the numbers of layers and of ranks if they are given. A ratio above 1 means that once is
better.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks._gpu_engine_model import FP8, SMALL, Shape, engine_options, of_ranks, shape_of
from benchmarks._harness import Worker, rig_parser, rig_result, write_json, write_result
from benchmarks._v4_gpu_model import v4_options, v4_shape_of
from benchmarks.v4_gpu import CONFIG as V4_CONFIG
from benchmarks.v4_gpu import SMALL as V4_SMALL

LAYERS, DENSE_LAYERS = 5, 3
TARGET = "benchmarks.workers.once_per_step:Engine"
ONCE, CHAINS, LOOP, LAUNCHES = "once", "two chains", "host loop", "launches in every layer"
PAIRS = 5
SEED_PERCENT = {"decode, eager": 8.1, "decode, captured": 13.9}
"""What FastDeploy #7367 took off the time of a token."""

Requests = dict[str, dict[str, Any]]


def requests_of(is_dry: bool) -> Requests:
    """Return the requests of each case: decode steps, and prompts of three kinds."""
    if is_dry:
        return {
            "decode": {"op": "decode", "batch": 1, "prompt": 256, "new": 32},
            "prompts, 16 x 8": {"op": "prefill", "batch": 16, "prompt": 8, "new": 1},
            "prompts, 4 x 200": {"op": "prefill", "batch": 4, "prompt": 200, "new": 1},
            "prompts, 64 after 512": {"op": "after", "prefix": 512, "prompt": 64},
        }
    return {
        "decode": {"op": "decode", "batch": 1, "prompt": 4096, "new": 128},
        "prompts, 64 x 128": {"op": "prefill", "batch": 64, "prompt": 128, "new": 1},
        "prompts, 8 x 4k": {"op": "prefill", "batch": 8, "prompt": 4096, "new": 1},
        "prompts, 512 after 32k": {"op": "after", "prefix": 32768, "prompt": 512},
        "prompts, 8k after 32k": {"op": "after", "prefix": 32768, "prompt": 8192},
    }


def v4_requests_of(is_dry: bool, eager: bool) -> Requests:
    """Return the requests of DeepSeek-V4: decode steps of one and more rows, and short prompts."""
    # eager steps take more than ten times as long
    new = 24 if eager else 128
    if is_dry:
        return {
            "decode": {"op": "decode", "batch": 1, "prompt": 256, "new": 8},
            "prompts, 4 x 200": {"op": "prefill", "batch": 4, "prompt": 200, "new": 1},
        }
    return {
        "decode": {"op": "decode", "batch": 1, "prompt": 4096, "new": new},
        "decode, 8 rows": {"op": "decode", "batch": 8, "prompt": 1024, "new": new},
        "prompts, 8 x 128": {"op": "prefill", "batch": 8, "prompt": 128, "new": 1},
        "prompts, 4 x 2k": {"op": "prefill", "batch": 4, "prompt": 2048, "new": 1},
    }


def config_of(is_dry: bool, eager: bool, ranks: int) -> dict[str, Any]:
    """Return fields of EngineConfig. Few rows are captured, because captures take time."""
    return {
        "max_model_len": 1024 if is_dry else 45056,
        "max_num_seqs": 64 if eager else 8,
        "max_num_batched_tokens": 1024 if is_dry else 8192,
        "target_inter_token_latency_ms": 0,
        "tensor_parallel_size": ranks,
        "enforce_eager": eager,
    }


def medians(options: dict[str, Any], work: str, requests: Requests) -> dict[str, float]:
    """Return the figure of each case, by an engine with the device for itself."""
    found = {}
    with Worker(TARGET, work=work, **options) as engine:
        for case, request in requests.items():
            figure = "tpot_ms" if request["op"] == "decode" else "tok_s"
            engine.call(**request)
            found[case] = statistics.median(engine.call(**request)[figure] for _ in range(PAIRS))
    return found


def in_turns(
    options: dict[str, Any], requests: Requests
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the figures of both forms of eager steps of DeepSeek-V4, in one engine, alternately.

    Eager steps wait for the host, whose speed may differ from process to process.
    """
    found: tuple[dict[str, float], dict[str, float]] = {}, {}
    with Worker(TARGET, work=LAUNCHES, **options) as engine:
        for case, request in requests.items():
            figure = "tpot_ms" if request["op"] == "decode" else "tok_s"
            engine.call(**request)
            values: tuple[list[float], list[float]] = [], []
            for turn in range(2 * PAIRS):
                # the order cancels a drift
                rebuilds = turn % 4 in (1, 2)
                engine.call(op="rebuild", rebuilds=rebuilds)
                values[rebuilds].append(engine.call(**request)[figure])
            for by_case, of_form in zip(found, values, strict=True):
                by_case[case] = statistics.median(of_form)
    return found


def entry_of(case: str, peer: str, other: float, once: float) -> dict[str, Any]:
    """Return the entry of a case."""
    is_time = case.startswith("decode")
    ratio = other / once if is_time else once / other
    entry = {
        "case": case,
        "peer": peer,
        "peer_value": other,
        "ours_value": once,
        "unit": "ms a token" if is_time else "prompt tokens/s",
        "ratio": ratio,
        # of the time that the other form takes
        "saved_percent": 100 * (1 - 1 / ratio),
    }
    if peer == CHAINS and case in SEED_PERCENT:
        entry["seed_percent"] = SEED_PERCENT[case]
    return entry


def show(entry: dict[str, Any]) -> None:
    """Print an entry."""
    seed = f"; FastDeploy #7367: {entry['seed_percent']} %" if "seed_percent" in entry else ""
    print(
        f"{entry['case']:<28} once {entry['ours_value']:10.3f}  {entry['peer']} "
        f"{entry['peer_value']:10.3f} {entry['unit']}  {entry['ratio']:.3f}x, "
        f"{entry['saved_percent']:.1f} % saved{seed}",
        flush=True,
    )


def compared(options: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cases in sequence, because the weights of two engines do not fit."""
    requests, ranks = requests_of(args.dry), args.tensor_parallel_size
    prompts = {case: request for case, request in requests.items() if request["op"] != "decode"}
    decode = {"decode": requests["decode"]}
    wanted = args.only or (["decode"] if ranks > 1 else ["decode", "prompts"])
    entries = []
    for eager in (False, True):
        others = {CHAINS: decode} if "decode" in wanted else {}
        if eager and "prompts" in wanted:
            others[LOOP] = prompts
        config = config_of(args.dry, eager, ranks)
        all_requests = {case: one for part in others.values() for case, one in part.items()}
        once = medians(options | {"config": config}, ONCE, all_requests) if others else {}
        for peer, part in others.items():
            for case, value in medians(options | {"config": config}, peer, part).items():
                label = f"{case}, {'eager' if eager else 'captured'}" if case == "decode" else case
                entry = entry_of(label, peer, value, once[case])
                entries.append(entry)
                show(entry)
    return entries


def compared_v4(options: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the cases of DeepSeek-V4, captured and eager."""
    for eager in (False, True):
        requests = v4_requests_of(args.dry, eager)
        form = {"enforce_eager": True} if eager else {"cudagraph_capture_sizes": [1, 2, 4, 8]}
        given = options | {"config": options["config"] | form}
        if eager:
            once, layers = in_turns(given, requests)
        else:
            once, layers = (medians(given, work, requests) for work in (ONCE, LAUNCHES))
        for case, value in layers.items():
            label = f"{case}, {'eager' if eager else 'captured'}"
            entry = entry_of(label, LAUNCHES, value, once[case]) | {"target": "V48"}
            show(entry)
            yield entry


def earlier_cases(earlier: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the other cases of an earlier result of the same model, commit and GPU."""
    same = all(earlier["env"].get(key) == result["env"].get(key) for key in ("commit", "gpu"))
    if not same or earlier.get("model") != result["model"]:
        return []
    measured = {entry["case"] for entry in result["cases"]}
    return [entry for entry in earlier["cases"] if entry["case"] not in measured]


def run_v4(args: argparse.Namespace) -> int:
    """Measure DeepSeek-V4 and write. Returns 0."""
    shape = v4_shape_of(1, args.layers, args.experts)
    model = shape._asdict() | {"weights": "random, FP8 with FP4 experts"}
    result = rig_result("once_per_step_v4", args, model=model)
    config: dict[str, Any] = {**(V4_SMALL if args.dry else V4_CONFIG), "max_num_seqs": 8}
    config.pop("cudagraph_capture_sizes", None)
    with v4_options(args, shape, config) as options:
        for entry in compared_v4(options, args):
            result["cases"].append(entry)
            # kept if an eager case has no time left
            write_json(args.out / f"{result['name']}.json", result)
    write_result(args.out, result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_split=True)
    parser.add_argument("--layers", type=int, metavar="N", help="of a model in FP8")
    parser.add_argument("--experts", type=int, metavar="N", help="of a layer")
    parser.add_argument(
        "--only", nargs="+", choices=["decode", "prompts"], help="the result keeps other cases"
    )
    parser.add_argument("--v4", action="store_true", help="DeepSeek-V4 on one GPU")
    args = parser.parse_args(argv)
    if args.v4:
        return run_v4(args)
    ranks, layers = args.tensor_parallel_size, args.layers
    shape = Shape(layers or LAYERS, DENSE_LAYERS, ranks=ranks)
    fields: dict[str, Any] = {}
    if args.dry:
        shape = shape._replace(experts=SMALL["n_routed_experts"])
    elif ranks > 1 or layers:
        shape = shape_of(ranks, layers) if ranks > 1 else shape
        fields = {"quantization_config": FP8}
    shape = shape._replace(experts=args.experts or shape.experts)
    name = of_ranks("once_per_step" + (f"_{layers}_layers" if layers else ""), ranks)
    weights = "random, FP8" if fields else "random"
    result = rig_result(name, args, model=shape._asdict() | {"weights": weights})
    with engine_options(args, shape, {}, fields) as options:
        result["cases"] = compared(options, args)
    path = args.out / f"{name}.json"
    if args.only and path.exists():
        result["cases"] = earlier_cases(json.loads(path.read_text()), result) + result["cases"]
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
