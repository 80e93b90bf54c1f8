"""The fixed evaluation file: chat prompts with checks and retrieval items with known answers.

One JSON object a line, by its field "kind":
  haystack   {id, text}
  retrieval  {id, length, haystack, start, end, needles: [[offset, sentence]], intro, question,
  answer, value, task}
             The prompt is made by `prompt_of`: haystack[start:end] with each sentence inserted at
             its offset (a sentence start inside the piece), then the question. `length` is about
             its number of tokens. No "task" (a plain needle) or "keys", "variables", "after".
  chat       {id, group, messages, answer, checks: [[kind, argument]]}
             `answer` is one right answer; a model is judged by `checks` (synth.checks.check).
             Group "sample" has no checks: it is there to be read.

The items were drawn once by generators of the documents. They stay as they are, but for the form of
19 sums, which follows the documents.
"""

from __future__ import annotations

import json
from pathlib import Path

from .tables import load

TASKS = ("keys", "variables", "after")
SAMPLES = load("samples").prompts


def prompt_of(item: dict, haystacks: dict[str, str]) -> str:
    """Return the user text of a retrieval item."""
    text = haystacks[item["haystack"]][item["start"] : item["end"]]
    for offset, sentence in sorted(item["needles"][::-1], key=lambda x: x[0], reverse=True):
        text = f"{text[:offset]}{sentence} {text[offset:]}"
    return f"{item['intro']}{text}\n\n{item['question']}"


def read(path: str | Path) -> tuple[list[dict], list[dict]]:
    """Return (retrieval items with their "prompt", chat items) of an evaluation file."""
    records = [json.loads(x) for x in Path(path).read_text(encoding="utf-8").splitlines()]
    haystacks = {r["id"]: r["text"] for r in records if r["kind"] == "haystack"}
    found = [r for r in records if r["kind"] == "retrieval"]
    for item in found:
        item["prompt"] = prompt_of(item, haystacks)
    return found, [r for r in records if r["kind"] == "chat"]
