"""The held-out prompts of heldout.json: what a served model answers, judged prompt by prompt.

The prompts were written before the generators that train the model, and `is_held_out` keeps them
out of every document. The groups of the file have these fields:
  category, language   "en" or "zh"
  check                "pattern": the answer matches the item's regular expression and refuses
                       nothing; "number": the item's number is the last one of the answer;
                       "refusal": one sentence of the group's language that refuses
  least_words, lines   bounds of a text (0 or missing = none)
  items                [prompt, expected]
`retrieval` has items of the evaluation file's form (evalset.prompt_of) with the number to find,
`calls` [prompt, tool, value] with alternatives of a value after "|", and `tools` the offered tools:
description, argument, type.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "heldout.json"


def plain(text: str) -> str:
    """The letters and digits of a text, in lower case."""
    return re.sub(r"[\W_]+", "", text.lower())


@cache
def read() -> dict[str, Any]:
    """The file."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def prompts() -> list[str]:
    """All prompts but those of retrieval, whose texts are held out by `sources.HELD_OUT`."""
    groups = (prompt for group in read()["groups"] for prompt, *_ in group["items"])
    return [*groups, *(prompt for prompt, *_ in read()["calls"])]


@cache
def _plain_prompts() -> frozenset[str]:
    return frozenset(map(plain, prompts()))


def is_held_out(text: str) -> bool:
    """True for a prompt of the file, whatever its case and punctuation."""
    return plain(text) in _plain_prompts()
