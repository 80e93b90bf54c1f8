"""Latencies and goodput of fd_dsa and vLLM under a load of requests that arrive at random.

    python -m benchmarks.load --rig --lengths chat --peer DIR     # one GPU: seven layers in FP8
    python -m benchmarks.load --rig -tp 4 --lengths chat --peer DIR
    python -m benchmarks.load --rig -tp 8 --experts 256 --lengths 8k1k --peer DIR
    python -m benchmarks.load --rig --lengths chat --rates 8 24   # ours alone, two of the rates,
    python -m benchmarks.load --earlier --lengths chat --rates 8 24 --peer DIR    # then vLLM's
    python -m benchmarks.load --dry     # small widths on the CPU: shows that it runs

Each engine gets the whole load twice, and the second time counts, because vLLM compiles kernels for
minutes while it serves. Both engines get the same files of arrivals. Our side is a server of its
own and a client process. vLLM's is its `AsyncLLM` in the process of its client, without HTTP, which
favours it. DIR has a `run.sh` that runs `python SCRIPT ...` with vLLM's packages, and a
`vllm_bench.py` with its weights.

Reported are the time to the first token, the time per token of a request, the gap between two
tokens, and good answers a second. A ratio above 1 means that ours is better. The p99 of our gaps is
also beside the target of our server. There a ratio above 1 means that the target holds. Writes
benchmarks/results/load.json, with the number of ranks at its end if there are several. A load of an
earlier command stays in the file if commit, machine and model are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._arrivals import (
    ARRIVING_S,
    LENGTHS,
    RUNS,
    WARM_UP_S,
    Arrival,
    Load,
    figures,
    rates_of,
)
from benchmarks._gpu_engine_model import SMALL, WIDTHS, engine_options, of_ranks, shape_of
from benchmarks._harness import (
    Answering,
    Worker,
    peer_command,
    rig_parser,
    rig_result,
    write_json,
)
from benchmarks._load_results import OURS, PEER, opened, put, refuse_others
from benchmarks._serving import loop_cpu_s, model_server
from benchmarks.gpu_engine import stamp
from fd_dsa.config import DEFAULT_TARGET_MS

CONFIG: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "max_model_len": 33024,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
}
# of our side
TARGET = {"target_inter_token_latency_ms": DEFAULT_TARGET_MS}
DRY: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8, "device": "cpu"}
# a file of arrivals -> answers of a side, `seconds` and what else it tells
Replay = Callable[[Path], dict[str, Any]]


@contextlib.contextmanager
def our_side(model: str, config: Mapping[str, Any], rig: bool) -> Iterator[Replay]:
    """Yield what replays a load on a server of its own."""
    with (
        model_server(model, {**config, **TARGET}, rig) as server,
        Worker("benchmarks.workers.load_client") as client,
    ):

        def replay(path: Path) -> dict[str, Any]:
            cpu, steps = loop_cpu_s(server.pid), server.steps()
            address = {"host": server.host, "port": server.port}
            found: dict[str, Any] = client.call(op="replay", load=str(path), **address)
            taken = server.steps() - steps
            shares = {kind: taken[kind] / max(taken.total(), 1) for kind in steps}
            share = (loop_cpu_s(server.pid) - cpu) / found["seconds"]
            return found | {"loop_share": share, "steps": shares}

        yield replay


@contextlib.contextmanager
def peer_side(folder: Path, model: str, config: Mapping[str, Any]) -> Iterator[Replay]:
    """Yield what replays a load on vLLM, whose packages the `run.sh` of a folder has."""
    ranks = config["tensor_parallel_size"]
    options = {key: value for key, value in config.items() if key != "device"}
    # run.sh looks for the flag
    command = peer_command(folder, "vllm_load.py", model, json.dumps(options), "--tp", str(ranks))
    with Answering(command) as vllm:
        print(f"vLLM {vllm.call(op='version')}", flush=True)
        yield lambda path: vllm.call(op="replay", load=str(path))


def check_peer(folder: Path) -> None:
    """Make sure that a folder can run vLLM, before ours takes its time.

    Raises:
        SystemExit: it cannot.
    """
    code = "from importlib.util import find_spec as f; assert f('vllm') and f('vllm_bench')"
    done = subprocess.run(["bash", str(folder / "run.sh"), "python", "-c", code])
    if done.returncode:
        raise SystemExit(f"--peer: {folder}/run.sh runs no `python` with vllm and vllm_bench")


def write_arrivals(load: Load, folder: Path, dry: bool) -> list[Path]:
    """Write a file of arrivals for each run of a load."""
    vocab_size = (SMALL if dry else WIDTHS)["vocab_size"]
    most_tokens = (DRY if dry else CONFIG)["max_model_len"]
    paths = [folder / f"{load.lengths}-{load.rate:g}-{run}.json" for run in range(RUNS)]
    for run, path in enumerate(paths):
        requests = load.arrivals(run, vocab_size, most_tokens)
        path.write_text(json.dumps([asdict(request) for request in requests]))
    return paths


def measure(load: Load, replay: Replay, files: Sequence[Path]) -> dict[str, Any]:
    """Return a side's result of a load: figures of the last run, and what differs in the first."""
    for path in files:
        requests = [Arrival(**request) for request in json.loads(path.read_text())]
        done = replay(path)
        found = figures(load, requests, done.pop("answers"))
        if path == files[0]:
            first = {key: found[key] for key in ("failed", "first_token_ms", "token_ms")}
    return {**found, **done, "first_run": first, "taken": stamp()}


def chosen(args: argparse.Namespace) -> list[Load]:
    """Return the loads that the flags choose.

    Raises:
        SystemExit: some lengths have no rates for this number of GPUs.
    """
    if args.dry:
        return [Load("chat", 4.0, seconds=3.0, warm_up_s=0.0)]
    known = rates_of(args.tensor_parallel_size)
    names = args.lengths or list(known)
    if unknown := [name for name in names if name not in known and not args.rates]:
        raise SystemExit(f"--lengths: {', '.join(unknown)} has no rates here; give --rates")
    return [Load(n, rate, args.seconds) for n in names for rate in args.rates or known[n]]


def line(side: str, found: Mapping[str, Any]) -> str:
    """Return a line about a side's result of a load."""
    latencies = {"first token": "first_token_ms", "a token": "token_ms", "gap": "gap_ms"}
    spreads = [
        f"{name} {found[key]['p50']:.1f} / {found[key]['p99']:.1f} ms"
        for name, key in latencies.items()
        if found[key]["p50"] is not None
    ]
    return (
        f"  {side}: {', '.join(spreads)}, {found['good_per_s']:.2f} good answers a second, "
        f"{found['failed']} failed, event loop {found['loop_share']:.0%}"
    )


def gap_line(gaps: Sequence[Mapping[str, Any]], load: Load) -> str:
    """Return a line about our gaps in a load beside the target."""
    (found,) = (one for one in gaps if one["load"] == load.name)
    ratio = found["ratio"]
    said = "no gaps" if ratio is None else f"ratio {ratio:.2f}, {'holds' if ratio >= 1 else 'late'}"
    return f"  target of {found['target_ms']:g} ms for gaps: {said}"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of the command."""
    parser = rig_parser(__doc__, is_split=True)
    parser.add_argument("--peer", type=Path, help="folder with vLLM's run.sh")
    parser.add_argument(
        "--earlier", action="store_true", help="the peer alone, beside ours in --out of this hour"
    )
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, help="default: all")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="requests a second; default: by lengths and GPUs"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=ARRIVING_S,
        help=f"of arrivals, the first {WARM_UP_S:g} not counted; default: {ARRIVING_S:g}",
    )
    parser.add_argument("--layers", type=int, help="of the model; default: seven, on several 61")
    parser.add_argument("--experts", type=int, help="of a layer; default: 256, on several 128")
    args = parser.parse_args(argv)
    if args.seconds <= WARM_UP_S:
        parser.error(f"--seconds: got {args.seconds:g}, must be more than {WARM_UP_S:g}")
    if args.earlier and not args.peer:
        parser.error("--earlier: needs --peer")
    return args


def measure_all(
    result: dict[str, Any],
    path: Path,
    files: Mapping[Load, Sequence[Path]],
    side: str,
    started: AbstractContextManager[Replay],
) -> None:
    """Start a side and measure its loads. Each is written as soon as it is there."""
    begin = time.perf_counter()
    with started as replay:
        result["start_s"][side] = time.perf_counter() - begin
        print(f"{side}: started in {result['start_s'][side]:.0f} s", flush=True)
        for load, paths in files.items():
            found = measure(load, replay, paths)
            print(f"{load.name}\n{line(side, found)}", flush=True)
            put(result, load, paths[-1], side, found)
            if side == OURS:
                print(gap_line(result["gaps"], load), flush=True)
            write_json(path, result)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    args = parsed(argv)
    ranks, loads = args.tensor_parallel_size, chosen(args)
    shape = shape_of(ranks, args.layers)
    shape = shape._replace(experts=args.experts or shape.experts)
    config = (DRY if args.dry else CONFIG) | {"tensor_parallel_size": ranks}
    known = {"loads": [], "start_s": {}, "target_ms": DEFAULT_TARGET_MS, **shape._asdict()}
    fresh = rig_result(of_ranks("load", ranks), args, **known)
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / f"{fresh['name']}.json"
    result = opened(path, fresh, is_peer_alone=args.earlier)
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_options(args, shape, config) as options,
    ):
        files = {load: write_arrivals(load, Path(folder), args.dry) for load in loads}
        if args.peer:
            check_peer(args.peer)
        if not args.earlier:
            ours = our_side(options["model"], config, args.rig)
            measure_all(result, path, files, OURS, ours)
        if args.peer:
            refuse_others(result, {load: paths[-1] for load, paths in files.items()})
            peer = peer_side(args.peer, options["model"], config)
            measure_all(result, path, files, PEER, peer)
    print(f"written: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
