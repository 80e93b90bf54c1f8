"""Requests that schemathesis makes from the OpenAPI document: such as fit it, and such as do not.

    python -m tests.soak.openapi_cases --examples 500 --seed 1

Over HTTP, against the server with the demo model's tokenizer and the checking runner.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from schemathesis import GenerationMode

from fd_dsa.engine.async_engine import AsyncEngine
from tests.serve.conftest import running
from tests.soak import report
from tests.soak.fuzz import ANSWER_WITHIN_S, check_answer, make_engine


def run(examples: int, seed: int) -> Counter[str]:
    """Send `examples` requests of each kind for each operation.

    Returns:
        How many answers of which operation had which status.

    Raises:
        AssertionError: an answer is not what a client may rely on; with the request.
    """
    counts: Counter[str] = Counter()
    with running(AsyncEngine(make_engine())) as live:
        document = httpx.get(f"{live.url}/openapi.json").json()
        for found in schemathesis.openapi.from_dict(document).get_all_operations():
            operation = found.ok()
            # by the document, only a body can be wrong
            modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
            for mode in modes:
                _try(live.url, operation, mode, examples, seed, counts)
        assert live.http.get("/health").status_code == 200
    return counts


def _try(
    url: str, operation: Any, mode: GenerationMode, examples: int, seed: int, counts: Counter[str]
) -> None:
    """One operation, with requests of one kind."""

    @seeded(seed)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        request = case.as_transport_kwargs(base_url=url)
        answer = requests.request(**request, timeout=ANSWER_WITHIN_S, allow_redirects=False)
        counts[f"{operation.label} {answer.status_code}"] += 1
        check_answer(case.method.upper(), operation.path, answer)

    send()


def main() -> None:
    """Run what the command line asks for and print what was answered."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=500, help="of each kind and operation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = run(args.examples, args.seed)
    title = f"{counts.total()} requests from the OpenAPI document, seed {args.seed}:"
    report.print_counts(title, counts)


if __name__ == "__main__":
    main()
