"""Python calls of one decode step of the demo model, on a CPU with one request.

    python -m benchmarks.python_calls                        # a few seconds
    python -m benchmarks.python_calls --baseline CHECKOUT    # and those of another checkout

Counts the calls of Python functions whose code is in the package, from `engine.step()` to its
return. The count depends on the code alone, not on the machine. Nothing is written.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks._harness import Worker, parser_of

CONTEXT, WARM_UP = 64, 5


def count_calls() -> Counter[str]:
    """Return calls of a decode step by function, as `file:name` below the package."""
    import numpy as np

    import fd_dsa
    from fd_dsa import SamplingParams
    from fd_dsa.config import EngineConfig
    from fd_dsa.startup.build import build_engine

    package = str(Path(fd_dsa.__file__).parent)
    engine = build_engine(
        EngineConfig(
            max_num_seqs=1,
            kv_cache_memory_bytes="256M",
            enable_prefix_caching=False,
            speculative_config="none",
        )
    )
    prompt = np.random.default_rng(0).integers(3, engine.runner.vocab_size, CONTEXT).tolist()
    engine.add_request("0", prompt, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
    while not engine.step():
        pass
    # bound launches and caches exist after some steps
    for _ in range(WARM_UP):
        engine.step()
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(package):
            calls[f"{path[len(package) + 1 :]}:{frame.f_code.co_name}"] += 1

    sys.setprofile(count)
    try:
        engine.step()
    finally:
        sys.setprofile(None)
    return calls


def main(argv: list[str] | None = None) -> int:
    """Print the count. Returns 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--baseline", type=Path, help="another checkout")
    parser.add_argument("--by-function", action="store_true", help="the most frequent ones, too")
    args = parser.parse_args(argv)
    calls = count_calls()
    print(f"{calls.total():,} Python calls in a decode step")
    if args.by_function:
        for name, count in calls.most_common(40):
            print(f"{count:6} {name}")
    if args.baseline is not None:
        with Worker("benchmarks.python_calls", checkout=args.baseline) as worker:
            count = sum(worker.call(op="count_calls").values())
        print(f"{count:,} in {args.baseline}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
