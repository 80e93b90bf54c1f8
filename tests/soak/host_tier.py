"""Random request histories with evicted blocks in host memory, whose copies are late.

    python -m tests.soak.host_tier --histories 10000
    python -m tests.soak.host_tier --first 4711 --histories 1

The histories are those of `tests.soak.histories` with few blocks, some of them on several ranks.
Each slot that a step reads must
hold what the tokens in front of it give, and each output is the one of the request alone.
"""

from __future__ import annotations

from collections import Counter

from tests.soak import report
from tests.soak.histories import draw_history, run_history, with_host_tier


def run_histories(first: int, count: int) -> Counter[str]:
    """Run the histories `first` .. `first + count - 1`; what happened in all of them."""
    numbers = range(first, first + count)
    return report.run_numbers(
        "tests.soak.host_tier",
        numbers,
        lambda number: run_history(with_host_tier(draw_history(number)), number),
    )


if __name__ == "__main__":
    report.main(__doc__, "histories", 10_000, run_histories)
