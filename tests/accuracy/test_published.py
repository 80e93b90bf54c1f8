"""`compare --counts`: figures of a table, read as what they can show."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.published import read_table
from fd_dsa.accuracy.types import METRICS, PROMPT_STRICT

ROOT = Path(__file__).resolve().parents[2]
BEFORE, AFTER = "86.69,91.01,89.46,93.05", "87.80,91.61,90.94,93.65"


def _main(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Status, output in one line, errors."""
    status = main(["compare", "--counts", *map(str, args)])
    shown = capsys.readouterr()
    return status, " ".join(shown.out.split()), shown.err


def test_counts_behind_the_percentages() -> None:
    rows = read_table(BEFORE, AFTER, 541, 834)
    counts = [(row.before, row.after, row.total) for row in rows.values()]
    assert counts == [(469, 475, 541), (759, 764, 834), (484, 492, 541), (776, 781, 834)]
    assert tuple(rows) == METRICS


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_any_share_is_found_again(counts: tuple[int, int]) -> None:
    passed, total = counts
    # more digits than 1 / 2000 needs; rounded to even and cut
    for text in (f"{100 * passed / total:.3f}", str(round(Decimal(100 * passed) / total, 3))):
        row = read_table(text, f"{passed}/{total}", total, 1)[PROMPT_STRICT]
        assert (row.before, row.after, row.total) == (passed, passed, total)


def test_the_table_is_within_noise(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, errors = _main(capsys, BEFORE, AFTER)
    assert (status, errors) == (0, "")
    assert text.startswith("Verdict. Within noise: as independent runs no difference is")
    assert "from a loss of 2.9 to a gain of 5.1 points" in text
    assert "significant only if no prompt got worse" in text
    assert "469 = 86.69 [83.6, 89.3]" in text


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("400/541", "480/541", "After is better on the primary metric"),
        ("480/541", "400/541", "After is worse on the primary metric"),
        ("480/541", "472/541", "only if at most 2 prompts got better"),
        ("480/541", "487/541", "only if at most 1 prompt got worse"),
        ("480/541", "485/541", "fewer than 6, no pattern is significant"),
        ("480/541", "480/541", "The net change is 0 prompts"),
        ("480/541,700/834", "482/541,780/834", "significant on Inst-level-strict-accuracy only"),
        ("541/541", "541/541", "from a loss of 0.7 to a gain of 0.7 points"),
    ],
)
def test_verdicts(capsys: pytest.CaptureFixture[str], before: str, after: str, words: str) -> None:
    status, text, _ = _main(capsys, before, after)
    assert status == 0
    assert words in text


def test_impossible_flips_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    # of 541 - 540 failing prompts none can get better beyond the net change
    _, text, _ = _main(capsys, "538/541", "541/541")
    assert text.endswith("0 3 0.25")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("86.70", "87.80"),
            "BEFORE: Prompt-level-strict-accuracy: 86.70 is the share of no count",
        ),
        (("86.69", "87"), "AFTER: Prompt-level-strict-accuracy: 87 stands for each of 468/541 to"),
        (("86.69,x", "86.69,91.01"), "BEFORE: Inst-level-strict-accuracy: got 'x'; allowed is a"),
        (("nan", "1"), "got 'nan'; allowed is a percentage of 0 to 100"),
        (("inf", "1"), "got 'inf'; allowed is a percentage"),
        (("100.5", "1"), "got '100.5'; allowed is a percentage"),
        (("469/540", "469/541"), "got '469/540'; allowed is 0/541 to 541/541"),
        (("542/541", "469/541"), "got '542/541'; allowed is 0/541 to 541/541"),
        (("86.69,91.01", "87.80"), "BEFORE has 2 figures, AFTER 1"),
        (("1,2,3,4,5", "1"), "BEFORE has 5 figures; allowed are 1 to 4"),
        (("0/541", "0/541", "--prompts", "0"), "--prompts: got 0; allowed is a whole number"),
        (("0/541", "0/541", "--allow", "seed"), "--allow: not with --counts"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    status, text, errors = _main(capsys, *args, "--out", out)
    assert (status, text) == (2, "")
    assert errors.count("\n") == 1 and message in errors
    assert not out.exists()


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main(capsys, BEFORE, AFTER, "--out", tmp_path)
    data = json.loads((tmp_path / "compare.json").read_text("utf-8"))
    assert data["metrics"][PROMPT_STRICT]["after"] == 475
    assert [(row["worse"], round(row["p"], 3)) for row in data["paired"]][:4] == [
        (0, 0.031),
        (1, 0.070),
        (2, 0.109),
        (3, 0.146),
    ]


def test_the_example_in_the_documentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page holds what its command writes, and the picture."""
    page = (ROOT / "docs" / "accuracy.md").read_text("utf-8")
    assert f"compare --counts {BEFORE} {AFTER}" in page
    _main(capsys, BEFORE, AFTER, "--out", tmp_path)
    written = (tmp_path / "compare.md").read_text("utf-8")
    body = written.split("\n\n", 1)[1].replace("(compare.svg)", "(img/accuracy_published.svg)")
    assert body in page
    assert _texts(tmp_path / "compare.svg") == _texts(ROOT / "docs/img/accuracy_published.svg")


def _texts(picture: Path) -> list[str]:
    """What a picture says; its lines may change with the release of matplotlib."""
    return [one.text for one in ET.parse(picture).iter() if one.text and one.tag.endswith("text")]
