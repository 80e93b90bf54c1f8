"""Ten thousand calls of every kernel: a difference between their outputs is a race.

    python -m benchmarks.subjects MODULE... --times N

Each call of a benchmark module is repeated N times over poisoned outputs, and every result is
compared with the first one.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

import torch

from benchmarks._gpu import Call, poison
from benchmarks._harness import LIMIT_VARIABLE, OUT_OF_TIME, parser_of
from benchmarks._torch_device import register


def subjects_of(
    modules: Sequence[str], failed: list[str]
) -> Iterator[tuple[str, Call, list[torch.Tensor]]]:
    """Yield label, call and outputs of every subject of these benchmark modules.

    Args:
        modules: names. A module that cannot make its subjects is skipped.
        failed: their names are added here.
    """
    register()
    for name in modules:
        try:
            module = importlib.import_module(f"benchmarks.{name}")
            found = getattr(module, "subjects", dict)()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
            continue
        for label, (call, outputs) in found.items():
            yield f"{name}: {label}", call, outputs


def repeat(modules: Sequence[str], times: int) -> int:
    """Repeat every call.

    Returns:
        1 if an output differs from the first one, or a call fails. 75 if there was no time for all
        calls, else 0.
    """
    failed: list[str] = []
    not_run: list[str] = []
    end = time.monotonic() + 0.9 * float(os.environ.get(LIMIT_VARIABLE, "inf"))
    for label, call, outputs in subjects_of(modules, failed):
        try:
            count = differing(call, outputs, times, end)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            count = -1
        if count is None:
            not_run.append(label)
        elif count:
            failed.append(label)
        print(f"repeated {times} times, {count} outputs differ: {label}", flush=True)
    print(f"failed: {failed}, no time for: {not_run}", flush=True)
    if failed:
        return 1
    return OUT_OF_TIME if not_run else 0


def differing(call: Call, outputs: list[torch.Tensor], times: int, end: float) -> int | None:
    """Count the outputs that differ from those of the first call. None = out of time."""
    first: list[torch.Tensor] = []
    count = torch.zeros((), device="cuda", dtype=torch.int64)
    for n in range(times + 1):
        # the host is ahead of the device by the length of a queue
        if n % 256 == 0 and time.monotonic() > end:
            return None
        poison(*outputs)
        call()
        found = [out.view(torch.uint8) for out in outputs]
        first = first or [out.clone() for out in found]
        for out, want in zip(found, first, strict=True):
            count += (out != want).any()
    return int(count)


def main(argv: Sequence[str] | None = None) -> int:
    """Repeat the calls. Returns the exit status."""
    parser = parser_of(__doc__)
    parser.add_argument("modules", nargs="+", help="benchmark modules, for example cache_write")
    parser.add_argument("--times", type=int, default=10_000)
    args = parser.parse_args(argv)
    return repeat(args.modules, args.times)


if __name__ == "__main__":
    sys.exit(main())
