"""Texts of our own for the generators, and a digest of what they draw."""

from __future__ import annotations

import hashlib

PROSE = (
    "The old miller walked slowly along the river and looked at the grey clouds. "
    "A small boy with a wooden bucket came down the narrow path to fetch some water. "
    '"Good morning," said the miller, "where does your little sister hide today?" '
    "The boy laughed, put the bucket down and pointed at the tall tree behind the house. "
    "There sat the girl on a strong branch, eating green apples and singing a quiet song. "
)
SHORT_PROMPTS = ["Once upon a time", "The capital of France is"]
# the last one has more tokens than the demo model selects
LEADING_PROMPTS = [
    *SHORT_PROMPTS,
    "The old miller walked slowly along the river and",
    "One day a fox named Ruby",
    f"{PROSE * 4}One day a fox named Ruby",
]
"""Prompts after which the best token always leads by so much that rounding changes none."""


def sample_sources():
    """Sources long enough for passages of a few thousand characters."""
    from demo_training.sources import Sources

    return Sources(
        problems=[("Ann has 3 pens and buys 4. How many?", "3 + 4 = <<3+4=7>>7.\n#### 7")],
        instructions=[("Name a colour.", "Blue.")],
        tales=PROSE * 40,
        play="MILLER:\nWho comes there, so late in the evening?\n\nBOY:\nOnly I. " * 200,
    )


class Bytes:
    """A tokenizer of one token a byte."""

    def encode(self, text, add_special_tokens=True):
        self.ids = [6 + x for x in text.encode()]
        return self

    def decode(self, ids, skip_special_tokens=True):
        return bytes(x - 6 for x in ids).decode()


def draw(seed, sources, count=3000):
    """Short documents and a long one."""
    from demo_training.synth import Generator

    generator = Generator(seed, sources)
    return [*(generator.document() for _ in range(count)), generator.long_document()]


def digest(documents) -> str:
    """A hash of documents."""
    return hashlib.sha256(repr(documents).encode()).hexdigest()
