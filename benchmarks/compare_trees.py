"""Our kernels in two checkouts on one GPU, in turn: the effect of a change of the source.

    python -m benchmarks.compare_trees CHECKOUT --only topk cache_write --rounds 2

Each round runs every benchmark in the other checkout, then in this one, without peers. A case
counts by the smallest median of its rounds. It has changed if the two differ by more than 3 %.
Below 10 us the limit is 0.3 us. With --earlier the rounds of an earlier
result count too, and its other benchmarks are kept. Writes compare_trees.json to --out; returns 1
if a case is slower.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import ROOT, environment, parser_of, write_json

MODULES = ("topk", "sparse_mla", "indexer_logits", "step_metadata", "cache_write")
SHARE, SHORT_US, SHORT_BELOW_US = 0.03, 0.3, 10.0


def medians(tree: Path, module: str, out: Path, quick: bool) -> dict[str, float]:
    """Return the microseconds of our side in every case of a benchmark, run in a checkout."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--out", str(out)]
    command += ["--quick"] if quick else []
    variables = os.environ | {"PYTHONPATH": str(tree)}
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{module}.log").open("w") as log:
        subprocess.run(command, cwd=tree, env=variables, stdout=log, stderr=log, check=False)
    path = out / f"{module}.json"
    if not path.exists():
        return {}
    cases = json.loads(path.read_text()).get("cases", [])
    return {case["case"]: case["times"][case["ours"]]["p50"] for case in cases}


def compared(before: dict[str, float], after: dict[str, float]) -> list[dict[str, Any]]:
    """Return the cases of both checkouts, with their changes."""
    entries = []
    for case in before.keys() & after.keys():
        old, new = before[case], after[case]
        allowed = SHORT_US if old < SHORT_BELOW_US else SHARE * old
        verdict = "slower" if new > old + allowed else "faster" if new < old - allowed else "same"
        entries.append({"case": case, "before_us": old, "after_us": new, "verdict": verdict})
    return sorted(entries, key=lambda entry: entry["case"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run both checkouts in turn. Returns 1 if a case is slower."""
    parser = parser_of(__doc__)
    parser.add_argument("baseline", type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", default=list(MODULES), metavar="BENCHMARK")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one or two shapes a benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "compare_trees")
    parser.add_argument("--commits", nargs=2, metavar="HASH", help="of both, older first")
    parser.add_argument("--earlier", type=Path, help="a result with rounds of the same kernels")
    args = parser.parse_args(argv)
    trees = {"before": args.baseline.resolve(), "after": ROOT}
    commits = dict(zip(trees, args.commits or (), strict=bool(args.commits)))
    # a copy of this tree may have no git
    os.environ |= {"FD_DSA_COMMIT": commits["after"]} if commits else {}
    result: dict[str, Any] = {"name": "compare_trees", "env": environment(), "commits": commits}
    earlier = json.loads(args.earlier.read_text()) if args.earlier else {"modules": {}}
    known = earlier["modules"]
    result |= {"quick": args.quick, "rounds": args.rounds, "modules": dict(known)}
    result |= {"earlier": earlier["commits"]} if args.earlier else {}
    for module in args.only:
        best: dict[str, dict[str, float]] = {
            side: {entry["case"]: entry[f"{side}_us"] for entry in known.get(module, ())}
            for side in trees
        }
        for number in range(args.rounds):
            for side, tree in trees.items():
                folder = (args.out / f"{side}{number}").resolve()
                for case, us in medians(tree, module, folder, args.quick).items():
                    best[side][case] = min(us, best[side].get(case, us))
        entries = result["modules"][module] = compared(best["before"], best["after"])
        alone = sorted(best["before"].keys() ^ best["after"].keys())
        for entry in entries:
            print(
                f"{module}: {entry['case']:44} {entry['before_us']:9.2f} -> "
                f"{entry['after_us']:9.2f} us  {entry['verdict']}",
                flush=True,
            )
        print(f"{module}: {len(entries)} cases in both, in one alone: {alone}", flush=True)
        write_json(args.out / "compare_trees.json", result)
    slower = sum(
        e["verdict"] == "slower" for entries in result["modules"].values() for e in entries
    )
    print(f"{slower} cases slower")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
