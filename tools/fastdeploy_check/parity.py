"""The same prompts through both paths: the same tokens, or others where the model hardly prefers
one.

Two correct implementations add in another order, so greedy tokens may part where two candidates
are nearly equal. They may part there only: at the first token that differs, the path that is
compared with must itself give our token a log probability within `margin` of its own choice. What
comes after that token is another text and is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Output:
    """One greedy answer.

    Attributes:
        tokens: as texts.
        top: for each token, log probabilities of the best candidates by text.
    """

    tokens: tuple[str, ...]
    top: tuple[dict[str, float], ...]


def prompts() -> list[str]:
    """Texts of several lengths; each is its own, so that none finds another in a prefix cache."""
    found = []
    for number, length in enumerate(_LENGTHS):
        order = _SENTENCES[number:] + _SENTENCES[:number]
        text = "".join(f"{i}. {order[i % len(order)]}" for i in range(length // 70 + 1))
        found.append(f"Text {number}: {text}\nThe text again, from its beginning: ")
    return found


def outputs(server: Server, texts: Sequence[str]) -> list[Output]:
    """Greedy answers with log probabilities.

    Raises:
        CheckFailed: the server gives no log probabilities.
    """
    return [_output(server, text) for text in texts]


def _output(server: Server, text: str) -> Output:
    fields = {"max_tokens": _MAX_TOKENS, "min_tokens": _MAX_TOKENS, "temperature": 0}
    answer = server.post("/v1/completions", prompt=text, logprobs=_TOP, **fields)
    logprobs = answer["choices"][0].get("logprobs")
    if not logprobs or not logprobs.get("tokens"):
        raise CheckFailed(
            f"{server.path} gives no log probabilities, which parity needs; --enable-logprob"
        )
    return Output(tuple(logprobs["tokens"]), tuple(logprobs["top_logprobs"]))


def compare(ours: Output, theirs: Output, margin: float = MARGIN) -> dict[str, Any]:
    """Where two answers part, and whether they may.

    Args:
        ours, theirs: answers to one prompt.
        margin: largest difference of log probabilities that counts as none.

    Returns:
        `same` tokens before they part, `tokens` in all, `gap` between the two candidates there
        (None where they do not part, or where ours is not among theirs), `passed`.
    """
    length = min(len(ours.tokens), len(theirs.tokens))
    pairs = zip(ours.tokens, theirs.tokens, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), length)
    found: dict[str, Any] = {"same": same, "tokens": length, "gap": None, "passed": length > 0}
    if same < length:
        candidates = theirs.top[same]
        own, other = candidates.get(theirs.tokens[same]), candidates.get(ours.tokens[same])
        if own is not None and other is not None:
            found["gap"] = round(own - other, 4)
        found["passed"] = found["gap"] is not None and found["gap"] <= margin
    elif len(ours.tokens) != len(theirs.tokens):
        found["passed"] = False
    return found
