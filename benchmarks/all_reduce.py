"""All-reduce of a decode step's rows among the GPUs of a machine, and NCCL's. Target P30.

    python -m benchmarks.all_reduce 2        # GPUs; and 4
    python -m benchmarks.all_reduce 2 --peers DIR       # and vLLM's custom all-reduce

It runs on Paddle's CPU wheel and the test plug-in. With vLLM's library, in a folder as
`benchmarks._peers` says, it runs on torch tensors. Rows have 7,168 values in bfloat16. Each figure
is the time of a call in a graph of many calls in a row. "norm" adds the following launch: residual
and RMSNorm. Writes all_reduce_<GPUs>.json of benchmarks/results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import environment, out_parser, write_result
from tests.distributed.gpu_ranks import run_ranks

_TIMEOUT_S = 400


def line(entry: dict[str, Any]) -> str:
    """Format an entry."""
    times = "  ".join(f"{k[:-3]} {v:.2f}" for k, v in entry.items() if k.endswith("_us"))
    return f"{entry['tokens']:4} tokens, {entry['kib']:6.0f} KiB, us: {times}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = out_parser(__doc__)
    parser.add_argument("gpus", type=int, choices=[2, 4, 8])
    parser.add_argument("--peers", type=Path, help="folder with vLLM's library")
    args = parser.parse_args(argv)
    from custom_ops.build_library import build_library
    from tests.gpu_rig.build import build

    # before several ranks build them
    build_library()
    if not args.peers:
        build("real")
    where = ("torch", str(args.peers.resolve())) if args.peers else ("rig",)
    by_rank = run_ranks("benchmarks._all_reduce", args.gpus, *where, timeout_s=_TIMEOUT_S)
    # a step waits for the slowest rank
    cases = [
        {key: max(entry[key] for entry in entries) for key in entries[0]}
        for entries in zip(*by_rank, strict=True)
    ]
    print(*map(line, cases), sep="\n")
    name = f"all_reduce_{args.gpus}"
    result = {"name": name, "tier": "T1p", "env": environment(), "gpus": args.gpus, "cases": cases}
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
