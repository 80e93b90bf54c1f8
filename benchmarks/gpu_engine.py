"""The embedded engine on GPUs and vLLM: DeepSeek-V3.2's widths, random weights.

    python -m benchmarks.gpu_engine --rig               # ours, on the test plug-in
    python -m benchmarks.gpu_engine --rig --peer DIR    # then vLLM on the same GPU
    python -m benchmarks.gpu_engine --rig --batch-invariant     # its cost, within the hour
    python -m benchmarks.gpu_engine --rig --tensor-parallel-size 4 --peer DIR
    python -m benchmarks.gpu_engine --rig -tp 4 --layers 8 --files /dev/shm   # start from files

Prompts are token ids of one seed. Answers are greedy and have a fixed length. All runs are in
process; on one GPU our mixed case also runs over HTTP. DIR has a `run.sh` that answers
`bench --out FILE.jsonl --scenarios ...` with a record for each case.

Writes benchmarks/results/gpu_engine.json. A ratio above 1 means that ours is better. The floor is
the time to read weights and caches at the copy rate, or to multiply at the rate of the tensor
cores. gpu_profile.json has the kernels of a step by purpose. With --batch-invariant the peer is
ours without it, of the same GPU and hour, and the file is gpu_engine_invariant.json. With --files
the weights come from a folder there, and gpu_start.json has the time of the start.

On several GPUs the model has the shape of DeepSeek-V3.2-REAP-345B, 61 layers of 128 experts. The
profile is that of rank 0, and the names of the files end with the number of ranks.
"""

from __future__ import annotations

import argparse
import calendar
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._gpu_engine_model import (
    CASES,
    FIGURES,
    Case,
    Shape,
    engine_options,
    floor,
    of_ranks,
    shape_of,
)
from benchmarks._harness import Worker, gpu_state, rig_parser, rig_result, write_json, write_result
from benchmarks._serving import model_server
from benchmarks.workers.gpu_engine import CLASSES, by_class
from benchmarks.workers.stream_client import streams

CAPTURED = (1, 2, 4, 8, 16, 32, 64, 128)
CONFIG: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "max_model_len": 33024,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 8192,
    "cudagraph_capture_sizes": CAPTURED,
}
TARGET = "benchmarks.workers.gpu_engine:Engine"
OVER_HTTP = "mixed-64x2k, HTTP"
# target on one GPU -> target on several GPUs
SEVERAL = {"P21": "P28", "P22": "P29", "P23": "P29"}


def over_http(model: str, rig: bool) -> float:
    """Return tokens a second of the mixed case through a server of its own."""
    case, seconds = CASES["mixed-64x2k"], []
    with model_server(model, CONFIG, rig) as server:
        for seed in range(1 + case.runs):
            size = {"requests": case.batch, "prompt_tokens": case.prompt}
            done = streams(server.host, server.port, new_tokens=case.new, seed=seed, **size)
            seconds.append(done["seconds"])
    return case.batch * (case.prompt + case.new) / min(seconds[1:])


def cases_of(names: Sequence[str], shape: Shape) -> dict[str, Case]:
    """Return cases by name, with the targets of one GPU or of several."""
    cases = {name: CASES[name] for name in names}
    if shape.ranks == 1:
        return cases
    return {name: case._replace(target=SEVERAL[case.target]) for name, case in cases.items()}


def measure(engine: Worker, cases: Mapping[str, Case]) -> Iterator[tuple[str, float]]:
    """Yield the figure of each case as soon as it is there."""
    for name, case in cases.items():
        values = []
        for _ in range(case.runs):
            sizes = {"batch": case.batch, "prompt": case.prompt, "new": case.new}
            values.append(engine.call(op=case.kind, **sizes)[FIGURES[case.kind][0]])
        yield name, sorted(values)[len(values) // 2]


def peer_values(
    folder: Path, cases: Mapping[str, Case], model: str, ranks: int = 1
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield vLLM's figures and their times, from its own process.

    Args:
        folder: has the `run.sh` that starts it.
        model: flags of the model's shape, as `run.sh` takes them.
    """
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
        command = ["bash", str(folder / "run.sh"), "bench", "--out", out.name]
        command += ["--capture", ",".join(map(str, CAPTURED)), "--tp", str(ranks)]
        runs = (f"{name}:{case.runs}" for name, case in cases.items())
        command += ["--scenarios", ",".join(["warm", *runs])]
        variables = os.environ | {"CONFIG": model}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as peer:
            for line in peer.stdout or ():
                if line.startswith("RESULT "):
                    print(line[:200], end="", flush=True)
                    record = json.loads(line.removeprefix("RESULT "))
                    if (name := record["name"]) in cases and "error" not in record:
                        yield name, record[FIGURES[cases[name].kind][0]], stamp()


def stamp() -> dict[str, Any]:
    """Return time and GPU of a figure."""
    gpu = gpu_state("uuid", "clocks.sm", "clocks.mem")
    return {"taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **gpu}


def is_of_now(taken: Mapping[str, Any]) -> bool:
    """Return True if the figure of a stamp is of this GPU and of the last hour."""
    age_s = time.time() - calendar.timegm(time.strptime(taken["taken"], "%Y-%m-%dT%H:%M:%SZ"))
    return age_s <= 3600 and taken.get("uuid", "") == gpu_state("uuid")["uuid"]


def entry(name: str, case: Case, ours: float, least: float | None) -> dict[str, Any]:
    """Return the entry of a case, without the peer.

    Args:
        least: floor of the case in its unit.
    """
    return {
        "case": name,
        "target": case.target,
        "peer": "vLLM",
        "peer_value": None,
        "ours_value": ours,
        "unit": FIGURES[case.kind][1],
        "ratio": None,
        "floor": least,
        "ours_taken": stamp(),
    }


def add_peer(case: dict[str, Any], kind: str, value: float, taken: dict[str, Any]) -> None:
    """Add the peer's figure to a case of a kind."""
    less_is_better, ours = FIGURES[kind][2], case["ours_value"]
    ratio = value / ours if less_is_better else ours / value
    case |= {"peer_value": value, "ratio": ratio, "peer_taken": taken}


def add_peers(
    result: dict[str, Any],
    path: Path,
    cases: Mapping[str, Case],
    folder: Path,
    model: str,
    ranks: int = 1,
) -> None:
    """Measure the peer's cases, see `peer_values`. Each is written as soon as it is there."""
    for name, value, taken in peer_values(folder, cases, model, ranks):
        for case in result["cases"]:
            if case["case"].partition(",")[0] == name:
                add_peer(case, cases[name].kind, value, taken)
        write_json(path, result)


def show_profile(profile: Mapping[str, Any]) -> None:
    """Print the largest kernels of a step."""
    print(
        f"  profile: busy {profile['busy_us']:.0f} us of {profile['wall_us']:.0f}, "
        f"{profile['launches']:.0f} launches"
    )
    for name, us, launches, own in profile["kernels"][:40]:
        print(f"    {us:9.1f} us  own {own:9.1f}  {launches:6.1f}  {name}", flush=True)


def measured_before(path: Path) -> dict[str, Any]:
    """Return our result, if this GPU gave it within the hour.

    Raises:
        SystemExit: it did not.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: not there; measure ours first, with the same --out")
    result: dict[str, Any] = json.loads(path.read_text())
    for case in result["cases"]:
        if not is_of_now(case["ours_taken"]):
            raise SystemExit(f"{path}: {case['case']} is older than an hour, or of another GPU")
    return result


def write_profiles(
    engine: Worker,
    args: argparse.Namespace,
    result: Mapping[str, Any],
    name: str,
    classes: Mapping[str, tuple[str, ...]] = CLASSES,
) -> dict[str, Any]:
    """Write kernels of decode steps and of a prompt, and their classes, and return them.

    Args:
        result: result of the same run.
        name: name of the file.
        classes: parts of the names of kernels, by class.
    """
    profiles = {}
    for rows in args.profile.split(","):
        profiles[rows] = engine.call(op="profile", batch=int(rows), prompt=4096, steps=8)
        show_profile(profiles[rows])
    profiles["8192"] = engine.call(op="profile_prompts", batch=1, prompt=8192)
    show_profile(profiles["8192"])
    found = {key: result[key] for key in ("env", "tier", "layers")} | {"name": name}
    found |= {"classes": by_class(profiles, classes), "profiles": profiles}
    write_json(args.out / f"{name}.json", found)
    return profiles


def measure_ours(args: argparse.Namespace, names: Sequence[str], path: Path) -> dict[str, Any]:
    """Measure our engine's cases and profiles. Each is written as soon as it is there."""
    ranks = args.tensor_parallel_size
    shape, config = shape_of(ranks, args.layers), CONFIG | {"tensor_parallel_size": ranks}
    result, cases = rig_result(path.stem, args, **shape._asdict()), cases_of(names, shape)
    with engine_options(args, shape, config) as options:
        with Worker(TARGET, **options) as engine:
            result["start"] = engine.call(op="start_up")
            print(result["start"], flush=True)
            engine.call(op="decode", batch=2, prompt=4096, new=16)
            for name, ours in measure(engine, cases):
                case = cases[name]
                print(f"{name:<16} {ours:10.2f} {FIGURES[case.kind][1]}", flush=True)
                result["cases"].append(entry(name, case, ours, floor(case, shape)))
                write_json(path, result)
            if args.profile:
                profiles = path.stem.replace("gpu_engine", "gpu_profile")
                write_profiles(engine, args, result, profiles)
        # a server starts again, with all weights
        if "mixed-64x2k" in names and ranks == 1:
            ours = over_http(options["model"], args.rig)
            print(f"{OVER_HTTP:<16} {ours:10.2f}", flush=True)
            result["cases"].append(entry(OVER_HTTP, cases["mixed-64x2k"], ours, None))
            write_json(path, result)
    return result


def measure_start(args: argparse.Namespace) -> None:
    """Write the time from the start to the first token, with random weights in files."""
    from benchmarks.real_widths import weights, write_checkpoint

    ranks = args.tensor_parallel_size
    shape, config = shape_of(ranks, args.layers), CONFIG | {"tensor_parallel_size": ranks}
    result = rig_result(of_ranks("gpu_start", ranks), args, **shape._asdict())
    files = config | {"load_format": "auto"}
    with engine_options(args, shape, files, parent=args.files) as options:
        folder = Path(options["model"])
        whole = json.loads((folder / "config.json").read_text())
        result["bytes"] = write_checkpoint(folder, whole, weights(whole, "cuda"))
        # the first start may compile kernels
        for start in ("first", "second"):
            with Worker(TARGET, **options) as engine:
                result[start] = engine.call(op="start_up")
            print(f"{result['bytes'] / 1e9:.1f} GB, {start} start: {result[start]}", flush=True)
    write_result(args.out, result)


def measure_invariant(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Write ours with FD_DSA_BATCH_INVARIANT=1 beside ours without it."""
    before = {case["case"]: case for case in measured_before(args.out / "gpu_engine.json")["cases"]}
    os.environ["FD_DSA_BATCH_INVARIANT"] = "1"
    path: Path = args.out / "gpu_engine_invariant.json"
    result = measure_ours(args, names, path)
    for case in result["cases"]:
        if without := before.get(case["case"]):
            case["peer"] = "without FD_DSA_BATCH_INVARIANT"
            kind = CASES[case["case"].partition(",")[0]].kind
            add_peer(case, kind, without["ours_value"], without["ours_taken"])
            print(f"{case['case']:<16} {case['ratio']:.2f} of the speed without it", flush=True)
    write_result(args.out, result)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_dry=False, is_split=True)
    parser.add_argument("--peer", type=Path, help="folder with vLLM's run.sh")
    parser.add_argument(
        "--earlier", action="store_true", help="the peer alone, beside ours in --out of this hour"
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="FD_DSA_BATCH_INVARIANT=1, beside ours without it in --out of this hour",
    )
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument(
        "--profile", default="1,32", help="rows of decode steps that are profiled, and a prompt"
    )
    parser.add_argument("--files", type=Path, help="folder for weights; the start alone, from them")
    parser.add_argument("--layers", type=int, help="default: as many as fit one GPU, or 61")
    args = parser.parse_args(argv)
    names = [name for name in args.cases.split(",") if name]
    if args.files:
        measure_start(args)
        return 0
    if args.batch_invariant:
        measure_invariant(args, names)
        return 0
    ranks = args.tensor_parallel_size
    path = args.out / f"{of_ranks('gpu_engine', ranks)}.json"
    result = measured_before(path) if args.earlier else measure_ours(args, names, path)
    if args.peer:
        shape = shape_of(ranks, args.layers)
        model = f"--layers {shape.layers} --dense {shape.dense} --experts {shape.experts}"
        add_peers(result, path, cases_of(names, shape), args.peer, model, ranks)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
