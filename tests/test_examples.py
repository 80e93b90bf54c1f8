"""Every file of `examples/` runs, and prints what its comments promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
# file -> what its output matches
PRINTED = {
    "chat": r"assistant: .+\nended by: stop after \d+ tokens\n"
    r"assistant: .*Paris.*\nprompt tokens: \d+ cached: [1-9]\d*\n",
    "operators": r"position and slot of the new token: 4 4\n"
    r"selected positions: \[\d, \d, \d\]\nattention output: .*1, 16, 512.*\n",
    "runner": "abc -> defghi length\nm -> nopqrs length\nwxy -> z stop\n",
    "stream": r"(?s)\[0\] .*\[1\] .*\[[01]\] complete: .*\[[01]\] complete: .*"
    r"running requests after close: 0\n",
    "structured": r"ended by: stop\nkeys: \['city', 'is_capital'\]\nchoice: (Paris|Rome|Berlin)\n",
}


def test_every_example_has_its_output_here() -> None:
    assert PRINTED.keys() == {path.stem for path in FOLDER.iterdir() if path.suffix == ".py"}


def _by_time(name: str) -> Any:
    """Mark an example that loads the demo model as slow."""
    marks = () if name in ("operators", "runner") else pytest.mark.slow
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [_by_time(name) for name in PRINTED])
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "structured":
        pytest.importorskip("llguidance", reason="llguidance (extra structured) is not installed")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.fullmatch(PRINTED[name], printed), printed


def test_an_example_is_short_and_says_how_it_is_started() -> None:
    for path in FOLDER.glob("*.py"):
        text = path.read_text("utf-8")
        assert f"python examples/{path.name}\n" in text
        assert len(text.splitlines()) <= 80
