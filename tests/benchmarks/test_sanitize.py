"""A checked run passes only where tests ran, passed, and the tool found nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import sanitize
from benchmarks._harness import LIMIT_VARIABLE, OUT_OF_TIME, ROOT
from benchmarks.sanitize import verdict


@pytest.mark.parametrize("tool", ["initcheck", "memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize(
    ("status", "old", "new", "says"),
    [
        (0, "", "", ""),
        (9, "", "", "exit status 9"),
        (255, "3 passed", "2 passed, 1 skipped", "exit status 255"),
        (255, "3 passed", "2 failed, 1 skipped", "exit status 255"),
        (0, "3 passed", "no tests ran", "no test ran"),
        (0, ": 0 ", ": 1 ", "found errors"),
        (0, "SUMMARY", "", "said nothing"),
    ],
)
def test_verdicts(tool: str, status: int, old: str, new: str, says: str) -> None:
    summary = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    text = f"3 passed in 2.1s\n========= {summary}\n"
    found = verdict(tool, status, text.replace(old, new) if old else text)
    assert says in found and bool(found) == bool(says)


def test_skipped_tests_are_no_fault_of_a_tool_without_work() -> None:
    text = (
        "3 skipped in 2.99s\n"
        "========= Error: Target application terminated before first instrumented API call\n"
    )
    assert verdict("racecheck", 255, text) == ""


@pytest.fixture
def checked_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with two tests, and a tool that finds nothing wrong."""
    tests, tools = tmp_path / "tests", tmp_path / "bin"
    tests.mkdir()
    (tests / "test_it.py").write_text(
        "import pytest, time\ndef test_one(): pass\ndef test_two(): pass\n"
        "def test_never(): time.sleep(99)\ndef test_not_here(): pytest.skip('nothing to do')\n"
    )
    tools.mkdir()
    tool = tools / "compute-sanitizer"
    # what comes before the interpreter is for the tool
    tool.write_text(
        '#!/bin/sh\nwhile [ "$1" != application-only ]; do shift; done; shift\n'
        '"$@"; code=$?\necho "RACECHECK SUMMARY: 0 hazards"; exit $code\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    monkeypatch.setattr(sanitize, "PYTEST_OPTIONS", ())
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(sanitize, "MAX_TESTS_A_PROCESS", 1)
    return tmp_path


def chosen(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Only these tests of the tree are checked."""
    tests = [f"tests/test_it.py::test_{name}" for name in names]
    monkeypatch.setattr(sanitize, "collect", lambda *_: tests)


def test_a_second_run_checks_what_there_was_no_time_for(
    checked_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = checked_tree / "done"
    chosen(monkeypatch, "one", "two")
    command = ["racecheck", "--workers", "1", "--done", str(done), "tests"]
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    assert sanitize.main(command) == OUT_OF_TIME
    assert not done.exists() and "0 of 2 tests clean or skipped" in capsys.readouterr().out
    monkeypatch.delenv(LIMIT_VARIABLE)
    assert sanitize.main(command) == 0
    assert done.read_text().split() == ["tests/test_it.py::test_one", "tests/test_it.py::test_two"]
    assert sanitize.main(command) == 0
    assert (
        "2 of 2 tests clean or skipped, 0 passed in this run; 0 of 0 processes"
        in capsys.readouterr().out
    )


def test_what_does_not_end_is_ended_and_does_not_count(
    checked_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen(monkeypatch, "never", "one")
    monkeypatch.setenv(LIMIT_VARIABLE, "3")
    assert sanitize.main(["racecheck", "--workers", "2", "tests"]) == OUT_OF_TIME
    assert "1 of 2 tests clean or skipped, 1 passed in this run" in capsys.readouterr().out


def test_nothing_is_shown_where_every_test_is_skipped(
    checked_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(monkeypatch, "not_here")
    assert sanitize.main(["racecheck", "tests"]) == 1
