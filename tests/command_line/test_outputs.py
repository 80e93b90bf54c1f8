"""Files of unfinished runs: locks, and other runs at every moment."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from fd_dsa.command_line.outputs import (
    append_line,
    lock,
    open_part,
    result_file,
    write_result,
)
from fd_dsa.errors import ConfigError


@pytest.fixture
def part(tmp_path: Path) -> Path:
    (tmp_path / "in").write_text("a request")
    return tmp_path / "out.part"


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Limit the size of files, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("mode", ["a", "ab", "a+b"])
def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, mode: str) -> None:
    with open(tmp_path / "out", mode) as file:
        append_line(file, "é" * 1000)
        with room_for(4096), pytest.raises(OSError, match="File too large"):
            append_line(file, "x" * 5000)
        append_line(file, "end")
    assert (tmp_path / "out").read_text("utf-8") == "é" * 1000 + "\nend\n"


def test_a_result_file_is_written_whole_or_stays(tmp_path: Path) -> None:
    linked, target = tmp_path / "link", tmp_path / "out.json"
    target.write_text("of an earlier run")
    linked.symlink_to(target)
    output = result_file("--output", str(linked))
    with (
        room_for(4096),
        pytest.raises(ConfigError, match=r"--output: .*out\.json cannot be written \("),
    ):
        write_result("--output", output, "x" * 100_000)
    assert target.read_text() == "of an earlier run"
    write_result("--output", output, "é" * 100_000)
    assert linked.is_symlink() and target.read_text("utf-8") == "é" * 100_000
    assert sorted(os.listdir(tmp_path)) == ["link", "out.json"]
    # a device is written in place
    null = result_file("--output", os.devnull)
    write_result("--output", null, "gone")
    assert null.is_char_device()


def opened(part: Path) -> IO[str]:
    """The file of a run."""
    return open_part("--output-file", part.with_suffix(""), str(part.with_name("in")))


def before_the_lock(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Act once between the opening of a file and its lock."""
    real, acts = fcntl.flock, [act]

    def flock(file: Any, operation: int) -> None:
        while acts:
            acts.pop()()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_run_that_begins_at_the_same_time_is_refused(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[IO[str]] = []

    def begin_other() -> None:
        others.append(opened(part))
        others[0].write("an answer")
        others[0].flush()

    before_the_lock(monkeypatch, begin_other)
    with pytest.raises(ConfigError, match=r"--output-file: .*out\.part has results of a run"):
        opened(part)
    assert part.read_text() == "an answer"
    others[0].close()


def test_a_run_that_ends_at_the_same_time_keeps_its_answers(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = part.with_suffix("")

    def run_other() -> None:
        with opened(part) as other:
            other.write("an answer")
            other.flush()
            os.replace(part, output)

    before_the_lock(monkeypatch, run_other)
    with opened(part) as file:
        file.write("another answer")
    assert output.read_text() == "an answer"
    assert part.read_text() == "another answer"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(
    part: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    part.write_text("an answer")
    with opened(part) as file:
        assert lock(file) and file.name == str(part)
    assert part.read_text() == ""
    assert part.with_name("out.part.1").read_text() == "an answer"
