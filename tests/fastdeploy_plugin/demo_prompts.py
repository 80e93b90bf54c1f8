"""Prompts for the demo model; Hugging Face answers: tests/data/fastdeploy/demo_tokens.json.

The demo model's logits leave no doubt about an answer that it knows: the best token leads by
several units, where an fp8_ds_mla cache moves a logit by a few tenths. Answers end where the lead
falls below `LEAST_LEAD`; so tokens must agree exactly, whatever the order of sums.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.demo.samples import PROSE

FILE = Path(__file__).parents[1] / "data" / "fastdeploy" / "demo_tokens.json"
LEAST_LEAD = 3.0
MOST_TOKENS = 24

# past 256 tokens a token sees what its indexers pick: the answers stand far before the questions
PASSAGE = (
    f"{PROSE}The special number for Riga is 61348. {PROSE}Ravi has hidden the silver bell in the "
    f"museum. {PROSE}Anna told everyone that the best food is bread. "
)
NUMBER = "What is the special number for Riga?"
BELL = "Where did Ravi hide the silver bell?"
FOOD = "What is the best food for Anna?"


def _last_words(text: str, count: int) -> str:
    return " ".join(text.split(" ")[-count:])


TEXTS = {
    # three questions about one passage, so with a prefix in common
    "number": f"{PASSAGE}\n\n{NUMBER}",
    "bell": f"{PASSAGE}\n\n{BELL}",
    "food": f"{PASSAGE}\n\n{FOOD}",
    "longest": f"{PASSAGE}{PROSE * 2}\n\n{NUMBER}",
    # answers that cross the end of a block: three slots are free, for a token and two drafts, so
    # that a row whose next block is late is blocked between two steps
    "edge": f"{_last_words(PASSAGE, 131)}\n\n{BELL}",
    "block": f"{_last_words(PASSAGE, 38)}\n\n{FOOD}",
    "sum": "What is 12 + 30?",
    "fact": "What is the capital of France?",
    "unknown": "Who invented the blue telephone box?",
    "repeat": "Repeat this: the grey cat sleeps on the wall.",
}


@dataclass(frozen=True)
class DemoPrompt:
    """A prompt and its greedy answer by Hugging Face, float32."""

    token_ids: list[int]
    answer: list[int]


@cache
def demo_prompts() -> dict[str, DemoPrompt]:
    """All prompts by name."""
    content = json.loads(FILE.read_text("utf-8"))["prompts"]
    return {name: DemoPrompt(one["token_ids"], one["answer"]) for name, one in content.items()}
