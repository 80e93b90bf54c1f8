"""Progress of loading: a bar on a terminal, lines of the log elsewhere."""

from __future__ import annotations

import io
import itertools

import pytest

from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.startup import progress
from fd_dsa.startup.load import load_model
from fd_dsa.startup.memory import format_bytes
from fd_dsa.startup.plan import make_plan
from fd_dsa.startup.progress import LoadProgress, StartupProgress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is 3 s after the one before."""
    ticks = itertools.count(0, 3)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))


def test_a_quick_load_has_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), LoadProgress(StartupProgress(), io.StringIO()) as progress:
        for done in range(0, 4097, 16):
            progress(done, 4096)
    assert caplog.messages == []


@pytest.mark.usefixtures("slow")
def test_plain_lines_by_quarters(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    with caplog.at_level("INFO"), LoadProgress(StartupProgress(), stream) as progress:
        for done in range(0, 4097, 16):
            progress(done, 4096)
    assert caplog.messages == [
        f"weights {percent} % {done}.0 KiB of 4.0 KiB"
        for percent, done in ((25, 1), (50, 2), (75, 3))
    ]
    assert stream.getvalue() == ""


@pytest.mark.usefixtures("slow")
def test_large_steps_make_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), LoadProgress(StartupProgress(), io.StringIO()) as progress:
        for done in (0, 60, 70, 80, 100):
            progress(done, 100)
    assert [line.split()[1] for line in caplog.messages] == ["60", "80"]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("total", [0, 1])
def test_the_end_of_a_load_has_no_line(caplog: pytest.LogCaptureFixture, total: int) -> None:
    with caplog.at_level("INFO"), LoadProgress(StartupProgress(), io.StringIO()) as progress:
        progress(total, total)
    assert caplog.messages == []


@pytest.mark.usefixtures("slow")
def test_a_load_tells_the_bytes_of_a_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    told: list[str] = []
    plan = make_plan(EngineConfig(device="cpu", max_model_len=128, max_num_seqs=1))
    load_model(plan, None, StartupProgress(lambda index, detail: told.append(detail)))
    total = format_bytes(sum(x.stat().st_size for x in demo_model_path().glob("*.safetensors")))
    assert told[-2:] == [f"{total} of {total}", ""]
    assert f" {total} read in " in caplog.messages[-1]


def test_bar_on_a_terminal() -> None:
    stream = Terminal()
    with LoadProgress(StartupProgress(), stream) as progress:
        progress(0, 1 << 20)
        progress(1 << 20, 1 << 20)
    assert "weights" in stream.getvalue()
    assert "100 %" in stream.getvalue()
    assert "MiB" in stream.getvalue()


def test_bar_ends_when_loading_fails() -> None:
    stream = Terminal()
    try:
        with LoadProgress(StartupProgress(), stream) as progress:
            progress(1, 4)
            raise OSError("disk")
    except OSError:
        pass
    before = stream.getvalue()
    # rich shows the cursor again when a bar has ended
    assert before.rstrip().endswith("\x1b[?25h")
