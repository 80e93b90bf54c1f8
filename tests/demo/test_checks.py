"""Each check of an answer, on one answer that keeps its rule and one that breaks it."""

from __future__ import annotations

import pytest
from demo_training.synth.checks import CHECKS, check

CASES = [
    ("lower", None, "all small.", "Not small."),
    ("upper", None, "ALL BIG.", "Not big."),
    ("nocomma", None, "one two", "one, two"),
    ("quote", None, '"inside"', '"open'),
    ("bullets", 2, "* a\n* b", "* a\n* b\n* c"),
    ("end", "See you.", "Hello. See you.", "See you. Hello."),
    ("repeat", "Say it.", "Say it.\n\nDone.", "Done. Say it."),
    ("copy", "as it is", "as it is", "as it is."),
    ("json", None, '```json\n{"a": 1}\n```', '{"a": 1'),
    ("title", None, "<<A Title>>\n\nText", "A Title\n\nText"),
    ("ps", "P.S.", "Text\n\nP.S. more", "Text"),
    ("placeholders", 2, "[name] lives in [city]", "[name] lives here"),
    ("highlight", 2, "a *b* c *d e*", "a *b* c"),
    ("paragraphs", 2, "one\n\n***\n\ntwo", "one two"),
    ("keywords", ["fox", "sea"], "A Fox at sea", "A fox"),
    ("forbidden", ["fox"], "the foxes", "a Fox"),
    ("frequency", ["fox", 2], "fox and Fox", "fox and foxes"),
    ("rarely", ["fox", 2], "a fox", "a fox and a fox"),
    ("letter", ["e", 2], "Even", "odd one"),
    ("fewletter", ["e", 2], "odd one", "Even"),
    ("capwords", 2, "NOT TODAY", "NOT today"),
    ("fewcaps", 2, "NOT today", "NOT TODAY"),
    ("two", None, "one\n******\ntwo", "one\n******\none"),
    ("choice", None, "My answer is yes.", "Yes."),
    ("sections", ["Part", 2], "Part 1\na\nPart 2\nb", "Part 1\na"),
    ("fewsent", 3, "One. Two.", "One. Two. Three."),
    ("manysent", 2, "One. Two!", "One."),
    ("atleast", 3, "one two three", "one two"),
    ("fewwords", 3, "one two", "one two three"),
    ("firstword", [2, 2, "Now"], "One.\n\nNow, two.", "Now, one.\n\nTwo."),
    ("equals", "Paris.", "Paris. ", "In Paris."),
    ("number", "12", "5 + 7 = 12.", "12 is 5 + 7."),
]


@pytest.mark.parametrize(("kind", "arg", "good", "bad"), CASES, ids=[c[0] for c in CASES])
def test_a_check_tells_a_kept_rule_from_a_broken_one(kind, arg, good, bad):
    assert check(kind, arg, good)
    assert not check(kind, arg, bad)


def test_every_check_has_a_case():
    assert {c[0] for c in CASES} == set(CHECKS)


def test_an_empty_answer_keeps_no_rule():
    assert not any(check(kind, arg, "  ") for kind, arg, _, _ in CASES)
