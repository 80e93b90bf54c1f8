"""The fixed evaluation file: chat prompts with checks and retrieval items with known answers.

One JSON object a line, by its field "kind":
  haystack   {id, text}
  retrieval  {id, length, haystack, start, end, needles: [[offset, sentence]], intro, question,
  answer, value}
             The prompt is made by `prompt_of`: haystack[start:end] with each sentence inserted at
             its offset (a sentence start inside the piece), then the question. `length` is about
             its number of tokens.
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
from .synth.pieces import Pieces
from .synth.prose import story
from .synth.questions import arithmetic, fact
from .synth.reading import copying, reading
from .synth.retrieval import INTRODUCTIONS, REPEATED, Needle, needle
from .synth.talk import names_chat, persona, problem, unknown

LENGTHS = (256, 512, 1024, 2048, 3072, 4000)
PER_LENGTH = 40
HAYSTACK_CHARACTERS = 16000
SAMPLES = (
    "Hello!",
    "Who are you?",
    "What is sparse attention?",
    "What is the capital of France?",
    "What is the opposite of hot?",
    "Tell me a story about a fox named Ruby.",
    "Write a short story about a robot who wants to be a painter.",
    "How can I sleep better?",
    "Give me exactly 3 bullet points on how to save money.",
    "What is 7 plus 5?",
    "Lily has 12 apples and buys 6 more. How many apples does Lily have now?",
    "Write about the sea. Use only lowercase letters.",
    "Describe my grandmother's kitchen. Do not use any commas.",
    "Tell me about trains in JSON format.",
    "Write an email to my boss about a holiday. End your answer with the exact phrase "
    '"See you soon."',
    "Why is the sky blue?",
    "Write a poem about rain.",
    "Name three fruits.",
    "Translate 'good morning' into French.",
    "What does a cow eat and where does it live?",
    "Rewrite the sentence in the past tense: I go to school every day.",
    "Repeat this sentence exactly as it is, and then answer it: Is a lion an animal?",
    "Tom has a red ball. Mia has a blue kite. Who has the blue kite?",
    "Can you help me plan a trip to Rome?",
    "My dog is ill. What should I do?",
    "Who won the world cup in 1998?",
    "what can you do",
    "Write a haiku about the moon.",
    "How do I fix a broken chair?",
    "I am bored.",
)


def prompt_of(item: dict, haystacks: dict[str, str]) -> str:
    """The user text of a retrieval item."""
    text = haystacks[item["haystack"]][item["start"] : item["end"]]
    for offset, sentence in sorted(item["needles"], reverse=True):
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
    """Four texts of the kinds used in training."""
    size = HAYSTACK_CHARACTERS
    stories = ""
    while len(stories) < size:
        stories += " ".join(story(p)) + " "
    return {
        "tales": re.sub(r"\s+", " ", p.sources.tales[200_000 : 200_000 + size + 500])[:size],
        "play": p.sources.play[300_000 : 300_000 + size],
        "stories": stories[:size],
        "repeated": (REPEATED[0] * (size // len(REPEATED[0]) + 1))[:size],
    }


def _retrieval_item(p: Pieces, tokenizer, haystacks: dict[str, str], length: int) -> dict | None:
    """An item of about `length` tokens, or None if the draw came out too long or too short."""
    name = p.choice([*haystacks, "tales", "stories"])
    starts = [m.end() for m in re.finditer(r"[.!?:]\s+", haystacks[name])]
    size = int(length * (3.9 if name in ("stories", "repeated") else 3.0)) - 40
    begin = p.choice([0, *(x for x in starts if x + size < len(haystacks[name]))])
    end = min(begin + max(size, 120), len(haystacks[name]))
    inside = [0, *(x - begin for x in starts if begin < x < end)]
    by_subject: dict[str, Needle] = {}
    for _ in range(p.choice([1, 2, 3])):
        found = needle(p, everyday=0.0)
        by_subject.setdefault(found.subject(), found)
    hidden = list(by_subject.values())
    asked = p.choice(hidden)
    item = {
        "kind": "retrieval",
        "length": length,
        "haystack": name,
        "start": begin,
        "end": end,
        "needles": [[p.choice(inside), x.sentence] for x in hidden],
        "intro": p.choice(INTRODUCTIONS),
        "question": asked.question,
        "answer": asked.answer,
        "value": asked.value,
    }
    document = [("user", prompt_of(item, haystacks)), ("assistant", asked.answer)]
    tokens = len(encode(tokenizer, document))
    return item if length * 0.85 <= tokens <= min(length * 1.1, 4090) else None


def _number(answer: str) -> str:
    """The last number of an answer, the value asked for in all sums."""
    return re.findall(r"\d+", answer)[-1]


def _chat_items(generator: Generator, per_group: int) -> list[dict]:
    """Chat items with checks, `per_group` of each kind of question."""
    p, found = generator.pieces, []

    def add(group: str, request: str, answer: str, checks: list, before=()) -> None:
        turns = [*before, ("user", request)]
        messages = [{"role": r, "content": x} for r, x in turns]
        item = {"group": group, "messages": messages, "answer": answer, "checks": checks}
        found.append({"kind": "chat", "id": f"{group}-{len(found):03d}"} | item)

    for _ in range(per_group):
        for group, make in (("fact", fact), ("reading", reading), ("unknown", unknown)):
            request, answer = make(p)
            add(group, request, answer, [["equals", answer]])
        request, answer = p.choice([persona, problem])(p)
        add("talk", request, answer, [["equals", answer]])
        request, answer = arithmetic(p)
        add("arithmetic", request, answer, [["number", _number(answer)]])
        turns = names_chat(p, [("user", "Tell me a joke."), ("assistant", "I know only old ones.")])
        add("memory", turns[-2][1], turns[-1][1], [["equals", turns[-1][1]]], turns[:-2])
        (_, request), (_, answer) = copying(p)
        add("copying", request, answer, [["copy", answer]])
    for _ in range(per_group * 6):
        x = generator.instruction()
        add("instruction", x.request, x.answer, [[kind, arg] for kind, arg in x.checks])
    for request in SAMPLES:
        add("sample", request, "", [])
    return found


def build(sources, tokenizer, path: str | Path, seed: int = 77777, per_group: int = 25) -> None:
    """Writes the evaluation file; the same sources, tokenizer and seed give the same file."""
    generator = Generator(seed, sources)
    p = generator.pieces
    haystacks = _haystacks(p)
    records = [{"kind": "haystack", "id": k, "text": v} for k, v in haystacks.items()]
    for length in LENGTHS:
        items: list[dict] = []
        while len(items) < PER_LENGTH:
            item = _retrieval_item(p, tokenizer, haystacks, length)
            if item:
                items.append({"id": f"retrieval-{length}-{len(items):02d}"} | item)
        records += items
    records += _chat_items(generator, per_group)
    lines = [json.dumps(x, ensure_ascii=False, separators=(",", ":")) for x in records]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
