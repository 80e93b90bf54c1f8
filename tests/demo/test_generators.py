"""Generated documents: right answers, kept rules, the same documents for the same seed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from demo_training.synth import check
from demo_training.synth.assignments import assigned, assignment
from demo_training.synth.checks import CHECKS
from demo_training.synth.instructions import instruction
from demo_training.synth.long_tasks import many_keys, variables
from demo_training.synth.questions import arithmetic
from demo_training.synth.reading import same_relation
from demo_training.synth.retrieval import retrieval

from .samples import digest, draw

# of 3,000 documents and a long one, before their wordings became data files
DIGEST = "e5d05f637c2a7223e0077acf79b7762f21b7481e724b11399523af6eb00c22df"


def test_every_generated_answer_keeps_its_own_rules(generator):
    seen = set()
    for draw_one in [instruction, assigned] * 2500:
        found = draw_one(generator.pieces)
        for kind, arg in found.checks:
            seen.add(kind)
            assert check(kind, arg, found.answer), (kind, arg, found)
    assert seen == set(CHECKS) - {"copy", "number"}  # asked for by the evaluation file alone


def test_every_rule_of_a_request_is_said(generator):
    for _ in range(1000):
        found = assignment(generator.pieces)
        for kind, arg in found.checks:
            for said in arg if isinstance(arg, (list, tuple)) else [arg]:
                word = str(said)
                if isinstance(said, str) and kind not in ("equals", "letter", "fewletter"):
                    assert word.lower() in found.request.lower(), (kind, arg, found)


def test_the_chain_of_a_variable_leads_back_to_its_value(generator):
    for _ in range(300):
        (_, request), (_, answer) = variables(generator.pieces, 200)
        names = re.findall(r"[A-Z]\d|[A-Z]{5}", answer)
        value = re.findall(r"\d{5}", request)[-1]
        said = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", request))
        assert said[names[0]] == value
        assert [said[n] for n in names[1:]] == names[:-1]
        assert {n for n, v in said.items() if v == value} == {names[0]}


def test_the_key_asked_for_has_the_value_of_its_line(generator):
    for _ in range(300):
        (_, request), (_, answer) = many_keys(generator.pieces, 200)
        value = re.findall(r"\d{5,}", answer)[-1]
        assert request.count(value) == 1
        key = re.search(r"(?:for|of|number of) (\S+) is \d+\.$", answer)[1]
        line = re.search(rf"[^.\n]*\b{key}\b[^.\n]*{value}", request)
        assert line, (request, answer)


def test_a_seed_gives_the_documents_it_always_gave(sources):
    """Those of the shipped model's training, in every process."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(root / "tools")}
    command = [sys.executable, str(root / "tests/demo/samples.py")]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == digest(draw(3, sources)) == DIGEST
    assert digest(draw(4, sources, 100)) != digest(draw(3, sources, 100))


def test_documents_are_conversations_that_end_with_an_answer(generator):
    roles_seen = set()
    for _ in range(3000):
        document = generator.document()
        roles = [role for role, _ in document]
        roles_seen.update(roles)
        assert all(text for _, text in document), document
        for role, text in document:
            # no field of a template is left open
            if role == "assistant" and not text.lstrip("`json\n").startswith("{"):
                assert not re.search(r"\{\w*\}", text), text
        if roles != ["raw"]:
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2), document
    assert roles_seen == {"raw", "system", "user", "assistant"}


def test_arithmetic_is_right(generator):
    right = {"+": int.__add__, "plus": int.__add__, "-": int.__sub__, "minus": int.__sub__}
    right["times"] = int.__mul__
    checked = 0
    for _ in range(2000):
        _, answer = arithmetic(generator.pieces)
        for a, sign, b, value in re.findall(
            r"(\d+) (\+|-|plus|minus|times) (\d+) (?:=|is) (\d+)", answer
        ):
            assert right[sign](int(a), int(b)) == int(value), answer
            checked += 1
    assert checked > 1000


def test_reading_answers_stand_in_the_text(generator):
    for _ in range(1000):
        text, questions = same_relation(generator.pieces)
        for question, answer in questions:
            name = answer.split(" ")[0].strip(".")
            value = answer.rstrip(".").split(" ")[-1]
            sentence = next(s for s in text if re.search(rf"\b{name}\b", s))
            assert value in sentence, (text, question, answer)


def test_a_needle_is_in_the_text_and_its_value_in_the_answer(generator):
    for length in (60, 800, 5000):
        for _ in range(100):
            (_, request), (_, answer) = retrieval(generator.pieces, length)
            haystack, question = request.rsplit("\n\n", 1)
            assert answer.split(" ")[-1].rstrip(".") in haystack
            assert question.endswith((".", "?"))
