"""The command line of soak runs whose cases are functions of a number, and their tables."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable


def print_counts(title: str, counts: Counter[str]) -> None:
    """A title, and what happened how often."""
    print(title)
    for name, count in sorted(counts.items()):
        print(f"  {name:45} {count:>12,}")


def run_numbers(
    module: str, numbers: range, run_history: Callable[[int], Counter[str]]
) -> Counter[str]:
    """Run the history of each number. Prints how to run one that fails again.

    Returns:
        How often things happened in all of them.
    """
    total: Counter[str] = Counter()
    for number in numbers:
        try:
            total += run_history(number)
        except BaseException:
            again = f"python -m {module} --first {number} --histories 1"
            print(f"history {number} failed; again: {again}", flush=True)
            raise
    return total


def main(
    doc: str | None, cases: str, default: int, run: Callable[[int, int], Counter[str]]
) -> None:
    """Run the cases that the command line asks for, and print what happened.

    Args:
        doc: docstring of the module; its first line says what the run is.
        cases: what the cases are called, also as a flag.
        default: how many of them.
        run: runs the cases `first` .. `first + count - 1`; what happened.
    """
    title = (doc or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument(f"--{cases}", type=int, default=default, dest="count")
    args = parser.parse_args()
    begin = time.monotonic()
    counts = run(args.first, args.count)
    counts["seconds"] = round(time.monotonic() - begin)
    print_counts(f"{args.count} {cases} from {args.first} on. {title}", counts)
