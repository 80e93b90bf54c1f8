"""Drafts of every method in random groups of requests leave their outputs as they are."""

from __future__ import annotations

from tests.soak.speculation import run_groups


def test_random_requests_have_the_outputs_of_no_drafts() -> None:
    counts = run_groups(first=1_000_000, count=2)
    for method in ("ngram", "mtp", "knowing"):
        assert counts[f"{method}: num_accepted_tokens"] > 0, method
