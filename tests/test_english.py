"""The prose of the tree keeps its form: no listed phrase, and counts that only fall.

The rules are those of tools/prose.py, which `make lint` runs as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import prose
from tools.prose import Finding, counts, risen

TREE = Path(__file__).parents[1]


def test_no_line_has_a_listed_phrase() -> None:
    bad = prose.phrase_errors(prose.tracked())
    assert not bad, "\n".join([f"{len(bad)} lines:", *bad])


def test_the_form_of_the_prose_gets_no_worse() -> None:
    bad = prose.form_errors(list(prose.findings(prose.tracked())))
    assert not bad, "\n".join(["python tools/prose.py prints these lines:", *bad])


def test_phrases_are_found_in_prose_alone(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text('"""Weights lie\non the device."""\nbehind = 1  # the row behind it\n')
    assert [number for number, _ in prose.prose(file)] == [1, 2, 3]
    assert [number for number, _ in prose.prose(TREE / "Makefile")][:2] == [1, 2]
    patterns = [pattern for pattern, _ in prose.phrases()]
    assert any(p.search("the caches lie on the device") for p in patterns)
    assert not any(p.search("behind a reverse proxy") for p in patterns)


LONG = "The " + "very " * prose.MAX_WORDS + "long sentence ends."


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("Return the rows.", []),
        ("Which rows there are.", ["first words"]),
        ("Those of a step.", ["first words"]),
        ("Whichever comes first.", []),
        ("Queue a step; None if idle.", ["semicolons"]),
        ("Return the rows.\n\nNobody waits, and nothing is copied.", ["negatives"]),
        ("Return the rows.\n\nNobody waits. `None` and `nothing` are names.", []),
        (f"Return the rows.\n\n{LONG}", ["long sentences"]),
        (f"Return the rows.\n\nArgs:\n    a: {LONG[:70]}\n    b: {LONG[:70]}", []),
    ],
)
def test_docstrings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rules: list[str]
) -> None:
    monkeypatch.setattr(prose, "TREE", tmp_path)
    (tmp_path / "fd_dsa/engine").mkdir(parents=True)
    indented = text.replace("\n", "\n    ")
    code = f'def run():\n    """{indented}"""\n'
    (tmp_path / "fd_dsa/engine/a.py").write_text(code)
    found = list(prose.findings(["fd_dsa/engine/a.py"]))
    assert [finding.rule for finding in found] == rules
    assert {finding.group for finding in found} <= {"fd_dsa/engine"}


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("# What it is\n\nA server.\n\n```\nWhat is this\n```\n", []),
        ("A server. What it serves is a model.", ["first words"]),
        ("- **Sizes.** One of them fits.", ["first words"]),
        ("| flag | Which model |\n", ["first words"]),
        ("The step copies nothing.", ["negatives"]),
        ("`none` and [None](nothing.md) are names.", []),
        (LONG, ["long sentences"]),
        ("<!-- result: a -->\nWhat is nothing.\n<!-- end -->\n", []),
    ],
)
def test_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rules: list[str]
) -> None:
    monkeypatch.setattr(prose, "TREE", tmp_path)
    (tmp_path / "page.md").write_text(text)
    assert [finding.rule for finding in prose.findings(["page.md"])] == rules
    assert not list(prose.findings(["page.zh.md"]))


def _finding(group: str) -> Finding:
    return Finding(group, "semicolons", f"{group}/a.py:1", "Do; that.")


def test_a_count_may_only_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "LIMITS", tmp_path / "limits.json")
    engine, page = _finding("fd_dsa/engine"), _finding("docs/a.md")
    prose.lower([engine, engine, page])
    assert prose.form_errors([engine, engine, page]) == []
    assert len(prose.form_errors([engine, engine, page, page])) == 3
    # a new page begins without any; a new package is bounded by the whole
    assert prose.form_errors([_finding("docs/new.md")])
    assert prose.form_errors([engine, _finding("fd_dsa/device")]) == []
    assert prose.form_errors([engine, engine, _finding("fd_dsa/device")])
    prose.lower([engine])
    assert json.loads(prose.LIMITS.read_text()) == counts([engine])
    # files may move from one package to another
    prose.lower([_finding("fd_dsa/serve")])
    assert prose.form_errors([_finding("fd_dsa/serve")]) == []
    prose.lower([engine])
    # a count that has risen is not written
    prose.lower([engine, engine])
    assert risen(counts([engine, engine]), json.loads(prose.LIMITS.read_text()))
