"""A checked run passes only where tests ran, passed, and the tool found nothing."""

from __future__ import annotations

import pytest

from benchmarks.sanitize import verdict

CLEAN = {
    "initcheck": "3 passed in 2.1s\n========= ERROR SUMMARY: 0 errors\n",
    "memcheck": "3 passed in 2.1s\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "3 passed in 2.1s\n===== RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n",
    "synccheck": "3 passed in 2.1s\n========= ERROR SUMMARY: 0 errors\n",
}


@pytest.mark.parametrize("tool", CLEAN)
def test_clean(tool: str) -> None:
    assert verdict(tool, 0, CLEAN[tool]) == ""


@pytest.mark.parametrize("tool", CLEAN)
@pytest.mark.parametrize(
    ("status", "old", "new", "says"),
    [
        (9, "", "", "exit status 9"),
        (0, "3 passed", "3 skipped", "no test ran"),
        (0, ": 0 ", ": 1 ", "found errors"),
        (0, "SUMMARY", "", "said nothing"),
    ],
)
def test_not_clean(tool: str, status: int, old: str, new: str, says: str) -> None:
    text = CLEAN[tool].replace(old, new) if old else CLEAN[tool]
    assert says in verdict(tool, status, text)
