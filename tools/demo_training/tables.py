"""The files of data/: words and templates of the documents, and other tables.

A template's fields are given by the code that fills it, or drawn: see `Pieces.say`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

DATA = Path(__file__).resolve().parent / "data"


def load(name: str) -> SimpleNamespace:
    """Return a file whose top-level keys are the attributes."""
    return SimpleNamespace(**json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")))


words = load("words")
WORDS = vars(words)
WORDS["city"] = list(words.capitals.values())
WORDS["food_or_fruit"] = words.foods + words.categories["fruit"]
WORDS["day_or_month"] = words.days + words.months
GRAMMAR = vars(load("grammar"))
for name in ("refusals", "chinese", "calls"):
    GRAMMAR |= load(name).grammar
