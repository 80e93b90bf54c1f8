"""Comparison of both paths: the same tokens, or others if the candidates are nearly equal.

Two correct implementations add in another order, so greedy tokens may part at nearly equal
candidates. At the first token that differs, the other path must itself give our token a log
probability within `margin` of its own token. The rest is another text and is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.fastdeploy_check.servers import CheckFailed, Server

MARGIN = 0.25
"""Natural logarithm of the odds between two tokens that count as equal; bfloat16 logits around 20
are 0.125 apart."""

_TOP = 5
_MAX_TOKENS = 64
_SENTENCES = (
    "A river that runs to the north grows wider below each of its towns. ",
    "Whoever counts the stones of a wall knows how long the builder needed. ",
    "The second letter of the archive was never opened by its reader. ",
    "Three carts of salt were exchanged for one of copper that winter. ",
)
# shorter and longer than the 2048 keys that the indexer chooses, in characters
_LENGTHS = (200, 2_000, 8_000, 24_000)


Logprobs = Mapping[str, Any]
"""Of an answer, as the OpenAI API gives them: `tokens` as texts, and `top_logprobs`, log
probabilities of the best candidates by text, for each token."""


def prompts() -> list[str]:
    """Return texts of several lengths. All differ, so that no prefix is cached."""
    found = []
    for number, length in enumerate(_LENGTHS):
        order = _SENTENCES[number:] + _SENTENCES[:number]
        text = "".join(f"{i}. {order[i % len(order)]}" for i in range(length // 70 + 1))
        found.append(f"Text {number}: {text}\nThe text again, from its beginning: ")
    return found


def answer(server: Server, text: str) -> Logprobs:
    """Return the greedy answer to a prompt.

    Raises:
        CheckFailed: the server gives no log probabilities.
    """
    fields = {"max_tokens": _MAX_TOKENS, "min_tokens": _MAX_TOKENS, "temperature": 0}
    choice = server.post("/v1/completions", prompt=text, logprobs=_TOP, **fields)["choices"][0]
    if not (choice.get("logprobs") or {}).get("tokens"):
        raise CheckFailed(
            f"{server.path} gives no log probabilities, which parity needs; --enable-logprob"
        )
    return choice["logprobs"]


def compare(ours: Logprobs, theirs: Logprobs, margin: float = MARGIN) -> dict[str, Any]:
    """Compare two answers, and judge the place where they part.

    Args:
        ours, theirs: answers to one prompt.
        margin: largest difference of log probabilities that counts as equal.

    Returns:
        `same` is the number of tokens before they part, and `tokens` the number in all. `gap` is
        the difference of the two candidates there, None if they do not part or ours is not among
        theirs. `passed` is the verdict.
    """
    own, other = ours["tokens"], theirs["tokens"]
    length, pairs = min(len(own), len(other)), zip(own, other, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), length)
    gap, passed = None, same == length > 0 and len(own) == len(other)
    if same < length:
        candidates = theirs["top_logprobs"][same]
        if other[same] in candidates and own[same] in candidates:
            gap = round(candidates[other[same]] - candidates[own[same]], 4)
            passed = gap <= margin
    return {"same": same, "tokens": length, "gap": gap, "passed": passed}
