"""One call of every kernel: under ncu, or ten thousand times to see the same bytes.

`python -m benchmarks.subjects profile MODULE...` makes each call once, warm, between the marks
that `ncu --profile-from-start off` waits for. `... repeat MODULE... --times N` poisons the
outputs, calls, and compares with the first result, N times; a difference is a race.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks._gpu import Call, poison


def subjects_of(modules: Sequence[str]) -> Iterator[tuple[str, Call, list[torch.Tensor]]]:
    """Label, call and outputs of every subject of these benchmark modules."""
    for name in modules:
        module = importlib.import_module(f"benchmarks.{name}")
        for label, (call, outputs) in module.subjects().items():
            yield f"{name}: {label}", call, outputs


def profile(modules: Sequence[str]) -> int:
    """Make every call once between the profiler's marks; prints the labels in that order."""
    for label, call, _ in subjects_of(modules):
        # the second call is warm: compiled and loaded
        call()
        torch.cuda.synchronize()
        print(f"subject {label}", flush=True)
        torch.cuda.profiler.start()
        torch.cuda.nvtx.range_push(label)
        call()
        torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def repeat(modules: Sequence[str], times: int) -> int:
    """Repeat every call; returns 1 if any output ever differs from the first one."""
    status = 0
    for label, call, outputs in subjects_of(modules):
        poison(*outputs)
        call()
        first = [out.view(torch.uint8).clone() for out in outputs]
        differing = torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(times):
            poison(*outputs)
            call()
            for out, want in zip(outputs, first, strict=True):
                differing += (out.view(torch.uint8) != want).any()
        count = int(differing)
        print(f"repeated {times} times, {count} outputs differ: {label}", flush=True)
        status |= count > 0
    return int(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("profile", "repeat"))
    parser.add_argument("modules", nargs="+", help="benchmark modules, for example cache_write")
    parser.add_argument("--times", type=int, default=10_000)
    args = parser.parse_args(argv)
    if args.what == "profile":
        return profile(args.modules)
    return repeat(args.modules, args.times)


if __name__ == "__main__":
    sys.exit(main())
