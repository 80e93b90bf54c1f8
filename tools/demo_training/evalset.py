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
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .rows import encode
from .synth import Generator
from .synth.long_tasks import chains_of, keys_of
from .synth.pieces import Pieces
from .synth.prose import story
from .synth.questions import arithmetic
from .synth.reading import texts
from .synth.retrieval import Needle, needle
from .tables import load

LENGTHS = (256, 512, 1024, 2048, 3072, 4000, 6000, 8000)
NEW_LENGTHS = (6000, 8000)  # of the second edition, which keeps the items of the first
TASK_LENGTHS = (257, 1024, 4000, 8000)
TASKS = ("keys", "variables", "after")
PER_LENGTH = 40
PER_TASK = 10
ASSIGNMENTS = 150
ANSWER_TOKENS = 220
HAYSTACK_CHARACTERS = 33000
LONGEST = 8100
SAMPLES = load("samples").prompts


def prompt_of(item: dict, haystacks: dict[str, str]) -> str:
    """The user text of a retrieval item."""
    text = haystacks[item["haystack"]][item["start"] : item["end"]]
    for offset, sentence in sorted(item["needles"][::-1], key=lambda x: x[0], reverse=True):
        text = f"{text[:offset]}{sentence} {text[offset:]}"
    return f"{item['intro']}{text}\n\n{item['question']}"


def read(path: str | Path) -> tuple[list[dict], list[dict]]:
    """(retrieval items with their "prompt", chat items) of an evaluation file."""
    records = [json.loads(x) for x in Path(path).read_text(encoding="utf-8").splitlines()]
    haystacks = {r["id"]: r["text"] for r in records if r["kind"] == "haystack"}
    found = [r for r in records if r["kind"] == "retrieval"]
    for item in found:
        item["prompt"] = prompt_of(item, haystacks)
    return found, [r for r in records if r["kind"] == "chat"]


def _haystacks(p: Pieces) -> dict[str, str]:
    """A text that is not trained on, and stories of the kind used in training."""
    size = HAYSTACK_CHARACTERS
    stories = ""
    while len(stories) < size:
        stories += " ".join(story(p)) + " "
    return {
        "long_tales": re.sub(r"\s+", " ", p.sources.held_out[: size + 1500])[:size],
        "long_stories": stories[:size],
    }


def _piece(p: Pieces, haystacks: dict[str, str], length: int) -> tuple[dict, list[int]]:
    """A piece of a haystack for about `length` tokens; the sentence starts inside it."""
    name = p.choice(list(haystacks))
    starts = [m.end() for m in re.finditer(r"[.!?:]\s+", haystacks[name])]
    size = int(length * (3.9 if "stories" in name else 3.2)) - 40
    begin = p.choice([0, *(x for x in starts if x + size < len(haystacks[name]))])
    end = min(begin + max(size, 120), len(haystacks[name]))
    inside = [0, *(x - begin for x in starts if begin < x < end)]
    piece = {"kind": "retrieval", "length": length, "haystack": name, "start": begin, "end": end}
    return piece, inside


def _fitting(item: dict, tokenizer, haystacks: dict[str, str]) -> dict | None:
    """The item, or None if it came out too long or too short."""
    document = [("user", prompt_of(item, haystacks)), ("assistant", item["answer"])]
    tokens = len(encode(tokenizer, document))
    length = item["length"]
    return item if length * 0.85 <= tokens <= min(length * 1.1, LONGEST) else None


def _retrieval_item(p: Pieces, tokenizer, haystacks: dict[str, str], length: int) -> dict | None:
    """An item of one to three plain needles."""
    piece, inside = _piece(p, haystacks, length)
    by_subject: dict[str, Needle] = {}
    for _ in range(p.choice([1, 2, 3])):
        found = needle(p, everyday=0.0)
        by_subject.setdefault(found.subject(), found)
    hidden = list(by_subject.values())
    asked = p.choice(hidden)
    item = piece | {
        "needles": [[p.choice(inside), x.sentence] for x in hidden],
        "intro": p.choice(texts.introductions),
        "question": asked.question,
        "answer": asked.answer,
        "value": asked.value,
    }
    return _fitting(item, tokenizer, haystacks)


def _task_item(p: Pieces, tokenizer, haystacks, length: int, task: str) -> dict | None:
    """Four keys of one form, two chains of four variables, or a sum after the text."""
    room = {"keys": 60, "variables": 70, "after": 0}[task] if length < 600 else 0
    piece, inside = _piece(p, haystacks, max(60, length - room))
    piece["length"] = length
    if task == "keys":
        lines, question, answer, value = keys_of(p, 4, 0)
    elif task == "variables":
        lines, question, answer, value = chains_of(p, 2, 3, long_names=False)
    else:
        question, answer = arithmetic(p)
        lines, value = [], _number(answer)
    places = sorted(p.choice(inside) for _ in lines)
    item = piece | {
        "needles": [[x, line] for x, line in zip(places, lines, strict=True)],
        "intro": "Read the text and answer the question at its end.\n\n",
        "question": question,
        "answer": answer,
        "value": value,
        "task": task,
    }
    return _fitting(item, tokenizer, haystacks)


def _number(answer: str) -> str:
    """The last number of an answer, the value asked for in all sums."""
    return re.findall(r"\d+", answer)[-1]


def _assignments(generator: Generator, tokenizer) -> list[dict]:
    """Long-winded requests with rules, those with an answer of at most ANSWER_TOKENS."""
    found: list[dict] = []
    while len(found) < ASSIGNMENTS:
        x = generator.assignment()
        if x.checks and len(tokenizer.encode(x.answer).ids) <= ANSWER_TOKENS:
            item = {"group": "assignment", "messages": [{"role": "user", "content": x.request}]}
            item |= {"answer": x.answer, "checks": [[kind, arg] for kind, arg in x.checks]}
            found.append({"kind": "chat", "id": f"assignment-{len(found):03d}"} | item)
    return found


def extend(sources, tokenizer, path: str | Path, seed: int = 88888) -> None:
    """Writes the second edition into a file: its items come after those of the first.

    The same sources, tokenizer and seed give the same items; those of the first edition, which an
    older generator drew, stay as they are.
    """
    generator = Generator(seed, sources)
    p = generator.pieces
    haystacks = _haystacks(p)
    records = [{"kind": "haystack", "id": k, "text": v} for k, v in haystacks.items()]
    wanted = [("", n, PER_LENGTH) for n in NEW_LENGTHS]
    wanted += [(task, n, PER_TASK) for task in TASKS for n in TASK_LENGTHS]
    for task, length, count in wanted:
        items: list[dict] = []
        while len(items) < count:
            if task:
                item = _task_item(p, tokenizer, haystacks, length, task)
            else:
                item = _retrieval_item(p, tokenizer, haystacks, length)
            if item:
                items.append({"id": f"{task or 'retrieval'}-{length}-{len(items):02d}"} | item)
        records += items
    records += _assignments(generator, tokenizer)
    new = {(r["kind"], r["id"]) for r in records}
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    named = [((r := json.loads(x))["kind"], r["id"]) for x in lines]
    kept = [x for x, name in zip(lines, named, strict=True) if name not in new]
    kept += [json.dumps(x, ensure_ascii=False, separators=(",", ":")) for x in records]
    Path(path).write_text("\n".join(kept) + "\n", encoding="utf-8")
