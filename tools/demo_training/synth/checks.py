"""Checks of the verifiable constraints. Every generated answer passes its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any


def _is_json(answer: str) -> bool:
    """Return True for valid JSON, alone or inside markdown ticks."""
    try:
        json.loads(re.sub(r"^```(json)?|```$", "", answer).strip())
    except ValueError:
        return False
    return True


def _paragraphs(answer: str) -> list[str]:
    return [x for x in re.split(r"\s?\*\*\*\s?", answer) if x.strip()]


def _halves(answer: str) -> bool:
    """Return True for exactly two different, non-empty answers around six asterisks."""
    parts = [x.strip() for x in answer.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _word_count(answer: str, word: str) -> int:
    return len(re.findall(r"\b" + re.escape(word) + r"\b", answer, re.I))


def _first_word(answer: str, arg: tuple[int, int, str]) -> bool:
    """Check a paragraph's first word.

    Args:
        arg: paragraphs (split by two line breaks), which one (from 1), its first word.
    """
    parts = [x for x in answer.split("\n\n") if x.strip()]
    return len(parts) == arg[0] and parts[arg[1] - 1].split()[0].strip(".,") == arg[2]


def letter_count(answer: str, letter: str) -> int:
    """Count a letter, in either case."""
    return answer.lower().count(letter.lower())


def count_capitals(answer: str) -> int:
    """Return words of capital letters only ("I" and "A" are such words)."""
    return sum(w.isupper() for w in re.findall(r"[A-Za-z][A-Za-z']*", answer))


CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "lower": lambda a, _: a == a.lower(),
    "upper": lambda a, _: a == a.upper(),
    "nocomma": lambda a, _: "," not in a,
    "quote": lambda a, _: len(a) > 1 and a[0] == a[-1] == '"',
    "bullets": lambda a, n: len(re.findall(r"^\s*[*-] ", a, re.M)) == n,
    "end": lambda a, phrase: a.lower().endswith(phrase.lower()),
    "repeat": lambda a, text: a.lower().startswith(text.lower()),
    "copy": lambda a, text: a == text,
    "json": lambda a, _: _is_json(a),
    "title": lambda a, _: re.search(r"<<[^\n]+>>", a) is not None,
    "ps": lambda a, mark: mark.lower() in a.lower(),
    "placeholders": lambda a, n: len(re.findall(r"\[.*?\]", a)) >= n,
    "highlight": lambda a, n: len(re.findall(r"\*[^\n*]+\*", a)) >= n,
    "paragraphs": lambda a, n: len(_paragraphs(a)) == n,
    "keywords": lambda a, words: all(w.lower() in a.lower() for w in words),
    "forbidden": lambda a, words: not any(_word_count(a, w) for w in words),
    "frequency": lambda a, arg: _word_count(a, arg[0]) >= arg[1],
    "rarely": lambda a, arg: len(re.findall(re.escape(arg[0]), a, re.I)) < arg[1],
    "letter": lambda a, arg: letter_count(a, arg[0]) >= arg[1],
    "fewletter": lambda a, arg: letter_count(a, arg[0]) < arg[1],
    "capwords": lambda a, n: count_capitals(a) >= n,
    "fewcaps": lambda a, n: count_capitals(a) < n,
    "two": lambda a, _: _halves(a),
    "choice": lambda a, _: a in CHOICES,
    "sections": lambda a, arg: len(re.findall(re.escape(arg[0]) + r" \d", a)) >= arg[1],
    "fewsent": lambda a, n: len(re.findall(r"[.!?](\s|$)", a)) < n,
    "manysent": lambda a, n: len(re.findall(r"[.!?](\s|$)", a)) >= n,
    "atleast": lambda a, n: len(a.split()) >= n,
    "fewwords": lambda a, n: len(a.split()) < n,
    "firstword": _first_word,
    "equals": lambda a, text: a == text,
    "number": lambda a, n: re.findall(r"\d+", a)[-1:] == [n],
}


def check(kind: str, arg: Any, answer: str) -> bool:
    """Return True if an answer satisfies a constraint.

    Args:
        kind: a key of CHECKS.
        arg: what the constraint names: a count, a phrase, words; None where there is nothing.
        answer: the whole answer; white space at its ends is ignored, an empty answer fails.

    Raises:
        KeyError: an unknown kind.
    """
    answer = answer.strip()
    return bool(CHECKS[kind](answer, arg)) if answer else False


def chat_counts(items: list[dict], answers: list[str]) -> dict[str, tuple[int, int]]:
    """Return (passed, all) checks by group and by kind of instruction."""
    counts: dict[str, tuple[int, int]] = {}

    def count(name: str, passed: bool) -> None:
        good, total = counts.get(name, (0, 0))
        counts[name] = (good + passed, total + 1)

    for item, text in zip(items, answers, strict=True):
        passed = [check(kind, arg, text) for kind, arg in item["checks"]]
        if item["checks"]:
            count(item["group"], all(passed))
        if item["group"] in ("instruction", "assignment"):
            for (kind, _), ok in zip(item["checks"], passed, strict=True):
                count(f"{item['group']}.{kind}", ok)
    return dict(sorted(counts.items()))
