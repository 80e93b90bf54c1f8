"""Verdicts, and the tables that show them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fd_dsa.accuracy.matrix import tables
from fd_dsa.accuracy.matrix.judging import Judgement, judge
from fd_dsa.accuracy.matrix.modes import MODES, Mode
from fd_dsa.accuracy.matrix.recording import Request
from fd_dsa.accuracy.matrix.workload import QUICK, Workload
from fd_dsa.accuracy.prompts import read_prompts
from fd_dsa.accuracy.report import Table, as_json
from fd_dsa.accuracy.types import Question
from tests.accuracy.matrix.traces import recording, trace

BY_NAME = {mode.name: mode for mode in MODES}
# asks for nothing but the absence of commas
PROMPT = next(p for p in read_prompts() if p.instruction_ids == ("punctuation:no_comma",))
IFEVAL, HIDDEN, TEXT = f"ifeval/{PROMPT.key}", "retrieval/passkey/9/0/0", "text/0"
CELL = {"task": "passkey", "length": 9, "depth": 0.0, "references": ["417"], "others": []}
WORKLOAD = Workload(
    tuple(Request(key, (1, 2), 4) for key in (IFEVAL, HIDDEN, TEXT)),
    (PROMPT,),
    {HIDDEN: Question(HIDDEN, (), 4, CELL)},
    QUICK,
)


def answers(*, comma: bool = False, found: bool = True, last: int = 7, **more: Any) -> Any:
    """Answers to the three requests."""
    return {
        IFEVAL: trace([3, 4], text="One, two." if comma else "One and two.", **more),
        HIDDEN: trace([5], text="It is 417." if found else "It is 418.", **more),
        TEXT: trace([6, last], text="on", **more),
    }


def lines_of(names: list[str], recordings: dict[str, Any], **skipped: str) -> list[Judgement]:
    modes: list[Mode] = [BY_NAME[name] for name in ("reference", *names)]
    return judge(modes, WORKLOAD, recordings, skipped)


def test_an_exact_mode_that_agrees() -> None:
    first, second = lines_of(
        ["chunk-64"],
        {
            "reference": recording("reference", answers(), [1.0] * 200),
            "chunk-64": recording("chunk-64", answers(shift=0.5), [1.1] * 200),
        },
    )
    assert (first.verdict, second.verdict) == ("reference", "exact")
    assert not second.failed
    assert first.ifeval is not None and (first.ifeval.passed, first.ifeval.total) == (1, 1)
    assert first.retrieval is not None and first.retrieval.passed == 1
    assert first.perplexity is not None and first.perplexity.value == pytest.approx(2.71828, 1e-4)
    assert second.perplexity is not None
    assert second.perplexity.ratio.value == pytest.approx(1.10517, 1e-4)


def test_an_exact_mode_that_differs_fails_and_is_told() -> None:
    recordings = {
        "reference": recording("reference", answers(gap=0.001)),
        "chunk-64": recording("chunk-64", answers(last=8, gap=0.001, shift=0.01)),
    }
    lines = lines_of(["chunk-64"], recordings)
    assert lines[1].verdict == "DIFFERS" and lines[1].failed
    assert "chunk-64 DIFFERS from reference in 1 requests; in 0 of them by rounding" in (
        tables.conclusion(lines)
    )
    told = "text/0 differs from token 1 on, gap 0.001; logits differ by 0.01 there, elsewhere by"
    assert any(told in note for note in notes_of(lines))


def test_a_deviation_fails_nothing_and_has_its_interval() -> None:
    recordings = {
        "reference": recording("reference", answers()),
        "fp8": recording("fp8", answers(comma=True, found=False, last=9, shift=0.1)),
    }
    _, line = lines_of(["fp8"], recordings)
    assert line.verdict == "deviation" and not line.failed
    assert line.agreement is not None and line.agreement.equal == 2
    assert line.ifeval is not None and (line.ifeval.passed, line.ifeval.worse) == (0, 1)
    assert line.retrieval is not None and (line.retrieval.worse, line.retrieval.better) == (1, 0)
    assert line.retrieval.difference.value == -1


def test_few_questions_without_a_flip_leave_much_open() -> None:
    recordings = {
        "reference": recording("reference", answers()),
        "fp8": recording("fp8", answers(last=9, shift=0.1)),
    }
    lines = lines_of(["fp8"], recordings)
    line = lines[1]
    assert line.retrieval is not None and line.retrieval.worse == line.retrieval.better == 0
    assert line.retrieval.difference.low < -0.5 and line.retrieval.difference.high > 0.5
    shown = str(tables.parts(lines, WORKLOAD.facts()))
    assert "0.00 [-79" in shown and "equal answers" not in shown


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("preemption", {"preemptions": 0}, "no request was preempted"),
        ("prefix-hits", {"prefix_hits": 0}, "no token was found in the prefix cache"),
    ],
)
def test_a_mode_in_which_nothing_happened_fails(
    name: str, facts: dict[str, int], reason: str
) -> None:
    recordings = {
        "reference": recording("reference", answers()),
        name: recording(name, answers(), **facts),
    }
    lines = lines_of([name], recordings)
    assert lines[1].verdict == "NOT REACHED" and lines[1].failed and lines[1].reason == reason
    assert f"{name} was NOT REACHED: {reason}" in tables.conclusion(lines)


def test_what_cannot_run_here_is_skipped_with_the_reason() -> None:
    lines = lines_of(["paddle"], {"reference": recording("reference", answers())}, paddle="no GPU")
    assert lines[1].verdict == "skipped" and not lines[1].failed
    assert "no GPU" in str(tables.parts(lines, WORKLOAD.facts()))


def test_long_requests_may_be_left_out() -> None:
    fewer = {key: one for key, one in answers().items() if key != HIDDEN}
    recordings = {
        "reference": recording("reference", answers()),
        "preemption": recording("preemption", fewer),
    }
    _, line = lines_of(["preemption"], recordings)
    assert line.agreement is not None and line.agreement.requests == 2
    assert line.retrieval is None and line.ifeval is not None


def test_bits_are_told_where_they_are_equal() -> None:
    recordings = {name: recording(name, answers()) for name in ("reference", "chunk-64")}
    lines = lines_of(["chunk-64"], recordings)
    assert "1 of 1 modes that must agree to the token do (1 of them bit for bit)" in (
        tables.conclusion(lines)
    )
    agreement, scores = (
        part for part in tables.parts(lines, WORKLOAD.facts())[1:3] if isinstance(part, Table)
    )
    assert agreement.rows[1][-1] == "all equal"
    assert scores.rows[0][:2] == ("reference", "1/1")


def test_the_report_is_json_without_gaps() -> None:
    recordings = {
        "reference": recording("reference", answers()),
        "fp8": recording("fp8", answers(last=900)),
    }
    lines = lines_of(["fp8", "paddle"], recordings, paddle="no GPU")
    data = json.loads(as_json([line.to_json() for line in lines]))
    assert [entry["verdict"] for entry in data] == ["reference", "deviation", "skipped"]
    assert data[1]["agreement"]["partings"][0]["gap"] is None
    assert set(tables.pictures(lines)) == {"matrix.svg"}


def notes_of(lines: list[Judgement]) -> list[str]:
    """Lines below all tables."""
    parts = tables.parts(lines, WORKLOAD.facts())
    return [note for part in parts if isinstance(part, Table) for note in part.notes]


def test_requests_of_a_workload_have_keys_of_their_own() -> None:
    assert WORKLOAD.digest != replace(WORKLOAD, requests=WORKLOAD.requests[:2]).digest
