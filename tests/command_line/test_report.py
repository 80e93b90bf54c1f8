"""Tables and files that the commands make."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from fd_dsa.command_line import report
from fd_dsa.command_line.report import Table
from fd_dsa.errors import ConfigError

TABLE = Table("Title", ("name", "a|b"), (("one", "1"), ("[bold]two", "2")), ("a note",))


def _shown(*parts: str | Table, width: int = 60) -> str:
    """Return the text that a terminal of `width` columns shows."""
    text = io.StringIO()
    console = Console(file=text, width=width, markup=False, highlight=False, emoji=False)
    report.show(parts, console)
    return text.getvalue()


def test_markdown() -> None:
    assert TABLE.markdown() == (
        "**Title**\n\n| name | a\\|b |\n| --- | ---: |\n| one | 1 |\n| [bold]two | 2 |\n\na note"
    )


def test_page_and_terminal_hold_the_same() -> None:
    parts = ["**Verdict.** `x` is fine", TABLE]
    page = report.page("Head", parts)
    assert page.startswith("# Head\n\n**Verdict.**") and page.endswith("a note\n")
    shown = _shown(*parts)
    assert shown.startswith("Verdict. x is fine\n")
    for text in ("Title", "[bold]two", "a|b", "a note"):
        assert text in shown


def test_narrow_terminals_shorten_names_before_figures() -> None:
    names = ("latency, ms", "mean", "median", "p90", "p99", "max")
    figures = ("12345.6", "12.34", "56.78", "90.12", "34.56")
    table = Table("", names, (("time per output token, the first excluded", *figures),))
    for width in (60, 80):
        assert set(figures) <= set(_shown(table, width=width).split())
    # figures fold, and none is lost
    shown = _shown(table, width=40)
    assert all(shown.count(digit) >= "".join(figures).count(digit) for digit in ".12345678")


class _ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_closed_pipe_is_left_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich itself would end the process with status 1, without a line."""
    monkeypatch.setattr(sys, "stdout", _ClosedPipe())
    for part in ("text", TABLE):
        with pytest.raises(BrokenPipeError):
            report.show([part])
    with pytest.raises(BrokenPipeError), Progress(console=report.Terminal(file=_ClosedPipe())):
        pass


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    report.write_files(out, {"x.md": "ä", "y.json": report.as_json({"k": "ü"})})
    assert (out / "x.md").read_text("utf-8") == "ä"
    assert json.loads((out / "y.json").read_text("utf-8")) == {"k": "ü"}
    with pytest.raises(UnicodeEncodeError):
        report.write_files(out, {"x.md": "new", "z.md": "\ud800"})
    assert sorted(path.name for path in out.iterdir()) == ["x.md", "y.json"]
    assert (out / "x.md").read_text("utf-8") == "ä"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    report.write_files(tmp_path, {"x.md": "old"})
    with (tmp_path / "x.md").open("rb", buffering=0) as reader:
        report.write_files(tmp_path, {"x.md": "new text"})
        assert reader.read() == b"old"
    assert (tmp_path / "x.md").read_text("utf-8") == "new text"


def test_nan_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        report.as_json({"k": math.nan})


def test_a_folder_is_checked_before_work_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*file is a file; give a folder"):
        report.check_folder(tmp_path / "file")
    report.check_folder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="not writable"):
        report.check_folder(tmp_path / "new")
