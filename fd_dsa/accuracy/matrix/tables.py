"""The tables of a matrix; each column is a heading and a function of a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fd_dsa.accuracy import plots, report
from fd_dsa.accuracy.matrix.agreement import Parting
from fd_dsa.accuracy.matrix.judging import (
    DEVIATION,
    DIFFERS,
    EXACT,
    MISSED,
    Judgement,
    Passed,
)
from fd_dsa.accuracy.stats import Estimate

PICTURE = "matrix.svg"
DATA_FILE = "matrix.json"
_NONE = "-"

Column = tuple[str, Callable[[Judgement], str]]


def _against(line: Judgement) -> str:
    return line.mode.against or _NONE


def _requests(line: Judgement) -> str:
    found = line.agreement
    if found is None:
        return _NONE
    text = f"{found.equal}/{found.requests}"
    return text if line.mode.exact else f"{text} ({report.percent(found.share)})"


def _tokens(line: Judgement) -> str:
    return _NONE if line.agreement is None else f"{line.agreement.tokens:,}"


def _parting(line: Judgement) -> str:
    """The earliest first difference; how far the two candidates lay apart there."""
    found = line.agreement.partings if line.agreement else ()
    if not found:
        return _NONE
    first = min(found, key=lambda parting: parting.position)
    return f"{first.position}, gap {_gap(first)}"


def _gap(parting: Parting) -> str:
    return "?" if parting.gap is None else f"{parting.gap:.1g}"


def _bits(line: Judgement) -> str:
    found = line.agreement
    if found is None:
        return _NONE
    return "all equal" if found.bit_for_bit else f"{found.logit_difference:.1g}"


def _share(passed: Passed | None) -> str:
    return _NONE if passed is None else f"{passed.passed}/{passed.total}"


def _change(line: Judgement, passed: Passed | None) -> str:
    """Difference in points with its interval."""
    if passed is None:
        return _NONE
    found = line.agreement
    if found is not None and found.equal == found.requests:
        return "equal answers"
    return report.points(passed.difference)


def _flips(passed: Passed | None) -> str:
    """What got worse and better, and the exact test."""
    if passed is None or math.isnan(passed.difference.value):
        return _NONE
    return f"{passed.worse}/{passed.better}, {passed.p:.2g}"


def _perplexity(line: Judgement) -> str:
    return _NONE if line.perplexity is None else f"{line.perplexity.value:.4f}"


def _ratio(line: Judgement) -> str:
    if line.perplexity is None or math.isnan(line.perplexity.ratio.value):
        return _NONE
    low, high = (100 * (bound - 1) for bound in line.perplexity.ratio[1:])
    return f"{100 * (line.perplexity.ratio.value - 1):+.3f} % [{low:+.3f}, {high:+.3f}]"


AGREEMENT: tuple[Column, ...] = (
    ("mode", lambda line: line.mode.name),
    ("beside", _against),
    ("verdict", lambda line: line.verdict),
    ("requests equal to the token", _requests),
    ("tokens", _tokens),
    ("first difference at", _parting),
    ("logits differ by at most", _bits),
)
SCORES: tuple[Column, ...] = (
    ("mode", lambda line: line.mode.name),
    ("IFEval strict", lambda line: _share(line.ifeval)),
    ("change, points", lambda line: _change(line, line.ifeval)),
    ("worse/better, p", lambda line: _flips(line.ifeval)),
    ("retrieval", lambda line: _share(line.retrieval)),
    ("change, points", lambda line: _change(line, line.retrieval)),
    ("worse/better, p", lambda line: _flips(line.retrieval)),
    ("perplexity", _perplexity),
    ("change", _ratio),
)


def parts(lines: Sequence[Judgement], workload: Mapping[str, Any]) -> list[str | report.Table]:
    """Paragraphs, tables and the picture of a report.

    Args:
        lines: of `judge`.
        workload: facts of the workload.
    """
    shown = [line for line in lines if line.facts]
    return [
        conclusion(lines),
        _table("Agreement to the token", AGREEMENT, shown, _agreement_notes(lines)),
        _table("Scores", SCORES, shown, _score_notes()),
        report.picture(PICTURE, "share of equal requests, IFEval and retrieval of every mode"),
        _modes_table(lines),
        _workload_text(workload),
    ]


def conclusion(lines: Sequence[Judgement]) -> str:
    """What follows, in a few sentences."""
    exact = [line for line in lines if line.verdict == EXACT]
    differ = [line for line in lines if line.verdict == DIFFERS]
    missed = [line for line in lines if line.verdict == MISSED]
    said = []
    if exact:
        bits = [line for line in exact if line.agreement and line.agreement.bit_for_bit]
        said.append(
            f"{len(exact)} of {len(exact) + len(differ)} modes that must agree to the token do"
            f" ({len(bits)} of them bit for bit): {_names(exact)}."
        )
    for line in differ:
        found = line.agreement
        partings = found.partings if found else ()
        near = sum(found.within_rounding(parting) for parting in partings) if found else 0
        said.append(
            f"{line.mode.name} DIFFERS from {line.mode.against} in {len(partings)} requests; in "
            f"{near} of them by rounding: logits differ there no more than elsewhere."
        )
    said += [f"{line.mode.name} was NOT REACHED: {line.reason}." for line in missed]
    for line in (line for line in lines if line.verdict == DEVIATION and line.agreement):
        said.append(f"{line.mode.name} is a deviation: {_requests(line)} requests are equal.")
    return "\n".join(said) if said else "No mode was compared with another."


def pictures(lines: Sequence[Judgement]) -> dict[str, str]:
    """File name -> SVG text."""
    panels: dict[str, dict[str, dict[str, Estimate]]] = {}
    columns: dict[str, Callable[[Judgement], Estimate | None]] = {
        "Requests equal to the token": lambda line: (
            line.agreement.share if line.agreement else None
        ),
        "IFEval, prompt-level strict": lambda line: line.ifeval.share if line.ifeval else None,
        "Retrieval": lambda line: line.retrieval.share if line.retrieval else None,
    }
    for title, value in columns.items():
        found = {line.mode.name: value(line) for line in lines}
        groups = {name: {"": share} for name, share in found.items() if share is not None}
        if groups:
            panels[title] = groups
    return {PICTURE: plots.bars(panels)}


def _table(
    title: str, columns: Sequence[Column], lines: Sequence[Judgement], notes: tuple[str, ...]
) -> report.Table:
    """A table of these columns."""
    rows = tuple(tuple(value(line) for _, value in columns) for line in lines)
    return report.Table(title, tuple(heading for heading, _ in columns), rows, notes)


def _modes_table(lines: Sequence[Judgement]) -> report.Table:
    """What each mode changes, and what happened in it."""
    rows = []
    for line in lines:
        facts = line.facts
        if not facts:
            rows.append((line.mode.name, line.mode.changed, line.reason, _NONE, _NONE, _NONE))
            continue
        served = "; ".join(f"{name}: {by}" for name, by in facts["providers"].items())
        hits = f"{facts['prefix_hits']:,} of {facts['prefix_queries']:,}"
        rows.append(
            (
                line.mode.name,
                line.mode.changed,
                served,
                f"{facts['steps']:,}",
                f"{facts['preemptions']:,}",
                hits if facts["prefix_queries"] else _NONE,
            )
        )
    columns = (
        "mode",
        "what it changes",
        "served by",
        "steps",
        "preemptions",
        "prefix hits, tokens",
    )
    return report.Table("Modes", columns, tuple(rows))


def _agreement_notes(lines: Sequence[Judgement]) -> tuple[str, ...]:
    """How to read the first table, and every request that differs in an exact mode."""
    notes = [
        "`exact`: every token of every request is equal. Logits are compared at every token before "
        "a difference, over the likeliest candidates; `all equal`: all logits, bit for bit."
    ]
    for line in lines:
        found = line.agreement
        if found is None or not line.mode.exact:
            continue
        for parting in found.partings:
            there = parting.logit_difference
            notes.append(
                f"{line.mode.name}: {parting.key} differs from token {parting.position} on, gap "
                f"{_gap(parting)}; logits differ by {_NONE if there is None else f'{there:.1g}'} "
                f"there, elsewhere by up to {found.logit_difference:.1g}."
            )
    return tuple(notes)


def _score_notes() -> tuple[str, ...]:
    """How to read the second table."""
    return (
        "Changes are against the mode named in the first table, paired by prompt: 95 % interval "
        "from the flips, exact McNemar test. Perplexity is that of one text in one pass; its "
        "change is resampled by stretches of 64 tokens. A dash: the mode changes nothing about "
        "one sequence.",
    )


def _workload_text(facts: Mapping[str, Any]) -> str:
    """What was asked, in words."""
    lengths = ", ".join(map(str, facts["retrieval_lengths"]))
    return (
        f"Asked: {facts['requests']} requests of {facts['prompt_tokens']:,} tokens in all, the "
        f"longest {facts['longest_prompt']:,}: {facts['ifeval']} IFEval prompts (answers of at "
        f"most {facts['ifeval_tokens']} tokens), retrieval from prompts of "
        f"{lengths} tokens, {facts['num_texts']} texts to go on "
        "with. Greedy."
    )


def _names(lines: Sequence[Judgement]) -> str:
    """Modes, separated by commas."""
    return ", ".join(line.mode.name for line in lines)
