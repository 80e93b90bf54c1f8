"""Requests that the model refuses in one sentence."""

from __future__ import annotations

from ..tables import load
from .pieces import Pieces

refusals = load("refusals")
SHARES = [kind["share"] for kind in refusals.kinds]
TOO_HARD = next(kind["answer"] for kind in refusals.kinds if kind["name"] == "task")


def refusal(p: Pieces) -> tuple[str, str]:
    """Return (a request for what the model cannot do, the refusal of its kind)."""
    kind = p.random.choices(refusals.kinds, SHARES)[0]
    return p.say(kind["ask"]), kind["answer"]


def hard_problem(p: Pieces) -> tuple[str, str]:
    """Return (a problem of the texts, or its beginning, and its refusal)."""
    question, _ = p.choice(p.sources.problems)
    return question, TOO_HARD
