"""Latencies and goodput of a server under a load of requests that arrive at random.

    python -m benchmarks.load --rig --lengths chat    # one GPU: seven layers in FP8
    python -m benchmarks.load --rig -tp 4 --lengths chat
    python -m benchmarks.load --dry                   # small widths on the CPU: shows that it runs

A server of its own gets each load twice, and the second time counts. The arrivals are drawn from a
seed, so another engine can get the same ones. Reported are the time to the first token, the time
per token of a request, the gap between two tokens, output tokens a second, and the share of good
answers. Writes benchmarks/results/load.json, with the number of ranks at its end if there are
several. vLLM's side is not measured yet, so no case has a ratio.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._arrivals import ARRIVING_S, LENGTHS, RATES, WARM_UP_S, arrivals, figures
from benchmarks._gpu_engine_model import SMALL, WIDTHS, engine_options, of_ranks, shape_of
from benchmarks._harness import Worker, rig_parser, rig_result, write_json, write_result
from benchmarks._serving import model_server

CONFIG: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "max_model_len": 33024,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
}
DRY: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8, "device": "cpu"}
SEED = 1


def measure(
    client: Worker, address: tuple[str, int], name: str, rate: float, dry: bool
) -> dict[str, Any]:
    """Return the case of one load, which the server gets twice.

    Args:
        name: distribution of the lengths.
        rate: requests a second.
        dry: True = a few seconds of arrivals, all of them counted.
    """
    lengths, (host, port) = LENGTHS[name], address
    seconds, warm_up_s = (3.0, 0.0) if dry else (ARRIVING_S, WARM_UP_S)
    vocab_size = (SMALL if dry else WIDTHS)["vocab_size"]
    most_tokens = (DRY if dry else CONFIG)["max_model_len"]
    load = arrivals(lengths, rate, SEED, vocab_size, seconds, most_tokens)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([asdict(one) for one in load], file)
        file.flush()
        for _ in range(2):
            done = client.call(op="replay", host=host, port=port, load=file.name)
    found = figures(load, done["times"], lengths, warm_up_s)
    return {"lengths": name, "rate": rate, "seed": SEED, **found}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_split=True)
    parser.add_argument("--lengths", choices=LENGTHS, action="append", help="default: all")
    parser.add_argument("--layers", type=int, help="of the model; default: seven, on several 61")
    args = parser.parse_args(argv)
    ranks = args.tensor_parallel_size
    rates = {"chat": (4.0,)} if args.dry else RATES[ranks]
    shape = shape_of(ranks, args.layers)
    config = (DRY if args.dry else CONFIG) | {"tensor_parallel_size": ranks}
    result = rig_result(of_ranks("load", ranks), args, **shape._asdict())
    path: Path = args.out / f"{result['name']}.json"
    with (
        engine_options(args, shape, config) as options,
        model_server(options["model"], config, args.rig) as address,
        Worker("benchmarks.workers.load_client") as client,
    ):
        for name in args.lengths or rates:
            for rate in rates.get(name, ()):
                case = measure(client, address, name, rate, args.dry)
                print(json.dumps(case), flush=True)
                result["cases"].append(case)
                write_json(path, result)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
