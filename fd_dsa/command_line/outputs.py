"""Files for the results of long work."""

from __future__ import annotations

import fcntl
import itertools
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from fd_dsa.errors import ConfigError, writing


def result_file(flag: str, name: str, source: str | None = None) -> Path:
    """Check a result file before the work, so that a wrong name loses no results.

    Args:
        flag: flag that has the name, for messages.
        source: file that the command reads, which the results must not replace; None = none.

    Returns:
        The target of symbolic links, so that writing keeps the links.

    Raises:
        ConfigError: the name is empty, or the file cannot be written. The message has flag, name
            and rule.
    """
    if not name:
        raise ConfigError(f"{flag}: got '', allowed: the name of a file")
    # such as a name that is too long, which later checks would raise too
    with writing(flag, name), suppress(FileNotFoundError, NotADirectoryError):
        os.stat(name)
    if is_special(Path(name)):
        # the target of /dev/stdout may have no name
        return Path(name)
    path = Path(os.path.realpath(name))
    if path.is_dir():
        raise ConfigError(f"{flag}: {name} is a folder; give a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}: {name}: the folder does not exist; make it first")
    for one in (path, path.parent):
        if one.exists() and not os.access(one, os.W_OK):
            raise ConfigError(f"{flag}: {one} cannot be written; give another file")
    if source is not None and path.exists() and os.path.samefile(path, source):
        raise ConfigError(f"{flag}: {name} is also the input; give another file")
    return path


def write_result(flag: str, output: Path, text: str) -> None:
    """Write a result file as a whole: after an error the earlier file, or none, is there.

    Args:
        output: the path of `result_file`.

    Raises:
        ConfigError: the file cannot be written, for example on a full disk.
    """
    with writing(flag, output):
        if is_special(output):
            output.write_text(text, "utf-8")
        else:
            replace_files(output.parent, {output.name: text})


def replace_files(out: Path, files: Mapping[str, str]) -> None:
    """Write texts as files of a folder.

    All texts are written before the first file gets its name, so that readers see whole files only.

    Raises:
        OSError: the folder cannot be written. All earlier files stay unless renaming fails.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, "utf-8")
        for name in files:
            os.replace(Path(folder) / name, out / name)


def open_part(flag: str, output: Path, source: str) -> IO[str]:
    """Open and lock the file for the results of an unfinished run, `output` with `.part` after it.

    A file that an earlier run has left gets another name, with a line on standard error.

    Args:
        flag, source: as in `result_file`.

    Raises:
        ConfigError: the file is the input, another run writes it, or it cannot be renamed.
    """
    part = output.with_name(f"{output.name}.part")
    if part.exists() and os.path.samefile(part, source):
        raise ConfigError(f"{flag}: {part}, for results so far, is also the input; give another")
    if part.is_symlink():
        _keep(flag, part)
    while True:
        with ExitStack() as closed:
            with writing(flag, part):
                # not "w", which would empty the file of a run that goes on
                file = closed.enter_context(part.open("a", encoding="ascii"))
            if not lock(file):
                rule = "has results of a run that goes on; wait for it, or give another"
                raise ConfigError(f"{flag}: {part} {rule}")
            status = os.fstat(file.fileno())
            if not part.exists() or not os.path.samestat(status, part.stat()):
                # the other run has ended since the file was opened
                continue
            if not status.st_size:
                closed.pop_all()
                return file
            _keep(flag, part)


def append_line(file: IO[Any], line: str) -> None:
    """Append a line as a whole: after an error the file ends before it.

    The line bypasses the buffer of the file, which would be written again when it is closed.
    """
    number, rest = file.fileno(), f"{line}\n".encode()
    size = os.fstat(number).st_size
    try:
        while rest:
            rest = rest[os.write(number, rest) :]
    except OSError:
        # a pipe or a device has no end
        with suppress(OSError):
            os.ftruncate(number, size)
        raise


def lock(file: IO[Any]) -> bool:
    """Lock a file until it is closed, if its file system has locks.

    Returns:
        False if another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # some network file systems have no locks
        pass
    return True


def _keep(flag: str, part: Path) -> None:
    """Rename a file that an earlier run has left, with a line on standard error."""
    names = (part.with_name(f"{part.name}.{number}") for number in itertools.count(1))
    kept = next(name for name in names if not os.path.lexists(name))
    with writing(flag, kept):
        part.rename(kept)
    sys.stderr.write(f"{part} of an earlier run is now {kept}\n")


def is_special(path: Path) -> bool:
    """Return True for a pipe or a device, which is written in place."""
    return path.exists() and not path.is_file() and not path.is_dir()
