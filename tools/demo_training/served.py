"""Rates of a server on the evaluation file."""

from __future__ import annotations

from typing import Any

from .evalset import TASKS
from .heldout import ask, body_of
from .synth import chat_counts


def rates(url: str, items: list[dict], chats: list[dict]) -> dict[str, Any]:
    """Ask a server all items, greedily. Returns what `reports.all_rates` returns, one mode each.

    An item of retrieval counts if the answer is the known one and ends there.

    Args:
        url: as for `ask`.
        items, chats: of evalset.read.
    """
    results: dict[str, Any] = {}
    for task in ("", *TASKS):
        chosen = [x for x in items if x.get("task", "") == task]
        choices = ask(url, [body_of(x["prompt"]) | {"max_tokens": 100} for x in chosen])
        counts: dict[int, list[bool]] = {}
        for item, found in zip(chosen, choices, strict=True):
            is_whole = found["finish_reason"] == "stop"
            right = is_whole and found["message"]["content"] == item["answer"]
            counts.setdefault(item["length"], []).append(right)
        shares = {length: round(sum(c) / len(c), 3) for length, c in sorted(counts.items())}
        results[task or "retrieval"] = {"served": shares}
    bodies = [{"messages": x["messages"], "temperature": 0, "max_tokens": 260} for x in chats]
    said = [found["message"]["content"] or "" for found in ask(url, bodies)]
    results["chat"] = chat_counts(chats, said)
    results["answers"] = {x["id"]: a for x, a in zip(chats, said, strict=True)}
    return results
