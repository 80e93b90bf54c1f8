"""Files of flags are read within a bound, whatever they are."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fd_dsa.command_line.inputs import read_bounded
from fd_dsa.errors import ConfigError


@pytest.mark.parametrize("size", [0, 1, 8])
def test_a_file_within_the_bound_is_read_whole(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * size)
    assert read_bounded(file, 8) == b"x" * size


def test_longer_files_and_devices_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    file.touch()
    # a size that a test could not read
    os.truncate(file, 1 << 42)
    for path in (str(file), "/dev/zero"):
        with pytest.raises(ConfigError) as caught:
            read_bounded(path, 8, "cut it")
        assert str(caught.value) == f"{path}: has more bytes, allowed: at most 8; cut it"


@pytest.mark.timeout(60)
def test_a_pipe_needs_a_writer(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="pipe: is a pipe without a writer; start the writer"):
        read_bounded(pipe, 1 << 20)
    # more than the kernel holds for a pipe
    content = bytes(range(256)) * 1024
    end, descriptor = os.pipe()
    with ThreadPoolExecutor() as pool, open(end, "rb"):
        read = pool.submit(read_bounded, f"/dev/fd/{end}", 1 << 20)
        with open(descriptor, "wb") as file:
            file.write(content)
        assert read.result(30) == content


def test_errors_of_the_system_stay(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "none", 8)
    with pytest.raises(IsADirectoryError):
        read_bounded(tmp_path, 8)
