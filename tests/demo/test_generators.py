"""Generated documents: kept rules, and the same documents for the same seed.

The digest of all kinds of documents shows that no change of them goes unseen: a model is trained
on the documents of one digest. The shipped model's documents are those of the commit that its
training's page names.
"""

from __future__ import annotations

import re

from demo_training.synth import check
from demo_training.synth.assignments import assigned
from demo_training.synth.checks import CHECKS
from demo_training.synth.instructions import instruction

from .samples import digest, draw

# of 3,000 documents and a long one
DIGEST = "42375ae5a80dd13d8add55143ab13ed21e4194da0bbeebda328c0695915bb15c"


def test_every_generated_answer_keeps_its_own_rules(generator):
    seen = set()
    for draw_one in [instruction, assigned] * 2500:
        found = draw_one(generator.pieces)
        for kind, arg in found.checks:
            seen.add(kind)
            assert check(kind, arg, found.answer), (kind, arg, found)
    assert seen == set(CHECKS) - {"copy", "number"}  # asked for by the evaluation file alone


def test_a_seed_gives_the_documents_it_always_gave(sources):
    """In every process: each has another seed for hashes."""
    assert digest(draw(3, sources)) == DIGEST
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
