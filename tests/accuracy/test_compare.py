"""`compare`: what it concludes, what it refuses, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from fd_dsa.accuracy import stats
from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.compare import compare, verdict
from fd_dsa.accuracy.scores import (
    INST_STRICT,
    METRICS,
    PROMPT_LOOSE,
    PROMPT_STRICT,
    Scores,
    setting_changes,
)
from fd_dsa.errors import ConfigError
from tests.accuracy.scored import SETTINGS, pairs, passing, prompt, run, write

GOOD = [True] * 60 + [False] * 40


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw few resamples, because tests/accuracy/test_stats.py checks the bounds of a bootstrap."""
    monkeypatch.setattr(stats, "RESAMPLES", 100)


def _worse(count: int, better: int = 0) -> list[bool]:
    """`GOOD`, some passes lost and some won."""
    return [False] * count + [True] * (60 - count + better) + [False] * (40 - better)


def _told(*args: Any, **options: Any) -> str:
    """The verdict on two runs, as one text."""
    return " ".join(verdict(compare(*args, **options)))


def test_flips_are_counted_each_way() -> None:
    found = compare(passing(GOOD), passing(_worse(3, 9)))
    change = found.primary
    assert (change.worse, change.better) == (3, 9)
    assert (change.before.passed, change.after.passed) == (60, 66)
    assert change.p == pytest.approx(0.146, abs=5e-4)
    assert change.difference.value == pytest.approx(0.06)
    assert change.difference.low < 0.06 < change.difference.high
    assert [flip.key for flip in found.flips if not flip.better] == ["0", "1", "2"]
    assert found.same_answers == 88


def test_metrics_follow_strict_and_loose_and_instructions() -> None:
    before = run([prompt("1", True, True), replace(prompt("2", False), follow_loose=(True,))])
    after = run([prompt("1", False, True), prompt("2", False)])
    found = compare(before, after)
    flips = {name: (m.worse, m.better) for name, m in found.metrics.items()}
    assert flips == dict(zip(METRICS, [(1, 0), (1, 0), (2, 0), (2, 0)], strict=True))
    assert found.metrics[INST_STRICT].p is None
    assert found.metrics[PROMPT_LOOSE].p == 0.5
    assert [flip.instructions for flip in found.flips] == [("a:0",)]


def test_equal_answers_are_the_strongest_statement() -> None:
    told = _told(passing(GOOD), passing(GOOD))
    assert told.startswith("Equal, answer by answer: all 100 answers have the same SHA-256")
    assert "McNemar" not in told and "Warning" not in told


def test_other_answers_with_the_same_results_bound_what_was_not_seen() -> None:
    told = _told(passing(GOOD), passing(GOOD, label="!"))
    assert "100 of 100 answers differ in their text." in told
    # 1 - 0.05^(1/100)
    assert "No change: no prompt changed its strict result. At most 3 % of such" in told


@pytest.mark.parametrize(("worse", "better", "word"), [(6, 0, "worse"), (0, 6, "better")])
def test_six_flips_in_one_direction_are_a_difference(worse: int, better: int, word: str) -> None:
    told = _told(passing(GOOD), passing(_worse(worse, better)))
    assert f"After is {word}: of 100 prompts, {worse} got worse and {better} got better" in told
    assert "p = 0.031, exact McNemar" in told


@pytest.mark.parametrize(("worse", "better"), [(5, 0), (0, 5)])
def test_borderline_is_said(worse: int, better: int) -> None:
    told = _told(passing(GOOD), passing(_worse(worse, better)))
    assert "No difference shown" in told and "p = 0.062" in told
    assert "Borderline: the interval leaves zero out" in told


@pytest.mark.parametrize(("worse", "better"), [(2, 0), (0, 1), (9, 3), (10, 10)])
def test_no_difference_shown_says_what_it_leaves_open(worse: int, better: int) -> None:
    found = compare(passing(GOOD), passing(_worse(worse, better)))
    told = " ".join(verdict(found))
    loss, gain = -100 * found.primary.difference.low, 100 * found.primary.difference.high
    assert loss > 0.5 and gain > 0.5
    assert f"No difference shown: of 100 prompts, {worse} got worse" in told
    assert f"a loss of up to {loss:.1f} points and a gain of up to {gain:.1f} points" in told
    assert f"at the observed {worse + better:.1f} %" in told
    assert "Fewer than 6 net flips (6.0 points) are never significant." in told


@given(pairs())
@settings(max_examples=10, deadline=None)
def test_swapping_the_runs_swaps_everything(both: tuple[Scores, Scores]) -> None:
    there, back = compare(*both), compare(*reversed(both))
    for name in METRICS:
        one, other = there.metrics[name], back.metrics[name]
        assert (one.before, one.after, one.p) == (other.after, other.before, other.p)
        assert (one.worse, one.better) == (other.better, other.worse)
        mirrored = (-other.difference.value, -other.difference.high, -other.difference.low)
        assert one.difference == pytest.approx(mirrored)
    assert there.same_answers == back.same_answers
    assert {f.key for f in there.flips} == {f.key for f in back.flips}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 512}, "max_tokens: 1280 before, 512 after"),
        ({"temperature": 0.7}, "temperature: 0.0 before, 0.7 after"),
        ({"thinking": True}, "thinking: None before, True after"),
        ({"task": "other"}, "task: 'ifeval' before, 'other' after"),
        (
            {"task_settings": {"prompts_sha256": "aaaa"}},
            "task_settings.prompts_sha256: '67ff' before, 'aaaa' after",
        ),
    ],
)
def test_decisive_settings_are_refused_unless_allowed(changes: Any, message: str) -> None:
    before, after = passing(GOOD), run(passing(GOOD).prompts, **changes)
    with pytest.raises(ConfigError) as error:
        compare(before, after)
    assert str(error.value).startswith(message)
    field = str(error.value).rpartition("--allow ")[2]
    found = compare(before, after, allow=[field])
    assert [change.name for change in found.settings if change.decisive] == [message.split(":")[0]]


def test_the_seed_is_decisive_only_where_answers_are_drawn() -> None:
    drawn = {"temperature": 1.0}
    assert not setting_changes(SETTINGS, replace(SETTINGS, seed=1))[0].decisive
    assert setting_changes(replace(SETTINGS, **drawn), replace(SETTINGS, seed=1, **drawn))[
        0
    ].decisive


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("1", "2"), "prompts: 3 before, 2 after, 2 in both; .*--allow prompts"),
        (("1", "2", "3", "4"), "prompts: 3 before, 4 after, 3 in both"),
        (("1", "2", "4"), "prompts: 3 before, 3 after, 2 in both"),
    ],
)
def test_other_prompts_are_refused_unless_allowed(keys: tuple[str, ...], message: str) -> None:
    before = run([prompt(key, True) for key in ("1", "2", "3")])
    after = run([prompt(key, True) for key in keys], task_settings={"prompts_sha256": "aa"})
    with pytest.raises(ConfigError, match=message):
        compare(before, after)
    found = compare(before, after, allow=["prompts"])
    assert found.prompts == len({"1", "2", "3"} & set(keys))
    assert (found.only_before, found.only_after) == (3 - found.prompts, len(keys) - found.prompts)


def test_runs_without_a_common_prompt_are_always_refused() -> None:
    with pytest.raises(ConfigError, match="0 in both; compare runs"):
        compare(run([prompt("1", True)]), run([prompt("2", True)]), allow=["prompts"])


def test_one_key_with_other_instructions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"key '1' has instructions a:0 before, a:0, b:1 after"):
        compare(run([prompt("1", True)]), run([prompt("1", True, True)]), allow=["prompts"])


def _main(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Status, output and errors of the command."""
    status = main(["compare", *map(str, args)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "float32", passing(GOOD))
    server = {**SETTINGS.server, "kv_cache_dtype": "fp8_ds_mla"}
    changed = replace(SETTINGS, concurrency=1, server=server)
    after = write(tmp_path / "fp8", replace(passing(_worse(30, 2)), settings=changed))
    out = tmp_path / "out"
    status, text, errors = _main(capsys, before, after, "--out", out)
    assert (status, errors) == (0, "")
    assert "After is worse: of 100 prompts, 30 got worse and 2 got better" in text
    assert "Warning: concurrency: 8 before, 1 after; greedy tokens may depend" in text
    assert "12 more: --out writes all." in text
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(files) == ["compare.json", "compare.md"]
    page = files["compare.md"].decode()
    assert page.startswith("# float32 and fp8\n\n**Verdict.** After is worse: of 100")
    assert "| server.kv_cache_dtype | float32 | fp8_ds_mla |" in page
    assert "| 29 | worse | a:0 |" in page and "12 more" not in page
    assert str(tmp_path) not in page
    data = json.loads(files["compare.json"])
    assert data["metrics"][PROMPT_STRICT]["worse"] == 30
    assert data["metrics"][PROMPT_STRICT]["difference"]["value"] == -28.0
    assert len(data["flips"]) == 32
    assert data["answers"] == {"same": 68}
    _main(capsys, before / "scores.json", after, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_command_with_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (write(tmp_path / n / "run", passing(GOOD)) for n in "ab")
    status, text, _ = _main(capsys, before, after)
    assert status == 0
    assert text.startswith("Verdict. Equal, answer by answer: all 100 answers have the same SHA")
    assert "All recorded settings are the same in both runs." in text
    assert "flipped" not in text
    other = write(tmp_path / "c" / "run", run(passing(GOOD).prompts, concurrency=1))
    _, text, _ = _main(capsys, before, other)
    # no flip needs an excuse
    assert "Warning" not in text and "concurrency" in text


def test_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = replace(SETTINGS, temperature=0.7)
    cut = [prompt("1", True, finish_reason="length"), prompt("2", False), prompt("4", True)]
    before = write(tmp_path / "a", Scores(drawn, tuple(cut[:2])))
    after = write(tmp_path / "b", Scores(replace(drawn, max_tokens=9), tuple(cut)))
    allowed = ("--allow", "max_tokens", "--allow", "prompts")
    status, text, _ = _main(capsys, before, after, *allowed)
    text = " ".join(text.split())
    assert status == 0
    assert "Warning: max_tokens: 1280 before, 9 after; allowed, but not done alike." in text
    assert "Warning: prompts: 0 only before, 1 only after, left out; 2 compared." in text
    assert "Warning: temperature above 0" in text
    assert "1 of 2 answers of before were cut at max_tokens 1280" in text
    assert "1 of 2 answers of after were cut at max_tokens 9" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a", "nothing"), "nothing: no such file or directory; give the folder"),
        (("a", "b"), "max_tokens: 1280 before, 512 after"),
        (("a", "a", "--allow", "max_token"), "--allow: got 'max_token'; allowed are .*max_tokens"),
        (("a", "a", "--out", "a/scores.json"), "--out: a/scores.json is a file"),
        (("a",), "the following arguments are required: AFTER"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", passing(GOOD))
    write(tmp_path / "b", run(passing(GOOD).prompts, max_tokens=512))
    files = sorted(tmp_path.rglob("*"))
    status, text, errors = _main(capsys, *args)
    assert (status, text) == (2, "")
    assert errors.count("\n") == 1 and errors.startswith("fd_dsa: error: ")
    assert message.split(".*")[0] in errors and message.split(".*")[-1] in errors
    assert sorted(tmp_path.rglob("*")) == files
