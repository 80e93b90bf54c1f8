"""The stored answers of a run, one JSON line each, written as soon as they arrive.

The first line holds the settings of the run. An interrupted run is opened again with the same
settings and asks the missing questions. An incomplete last line (the process or the machine died
during the write) is removed, and its question is asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from fd_dsa.accuracy.scores import RunSettings
from fd_dsa.client.questions import Answer, Question
from fd_dsa.errors import ConfigError, writing

_FORMAT = "fd_dsa answers 1"
# first bytes of the file, also if its first line is incomplete
_HEAD = json.dumps({"format": _FORMAT}).encode("ascii")[:-1]


@dataclass
class Run:
    """The content of a run's file.

    Attributes:
        records: key -> last answer, in the order of the first answers.
        file: file for further answers, or None for a run that is only read.
    """

    settings: RunSettings
    records: dict[str, Answer] = field(default_factory=dict)
    file: BinaryIO | None = None

    @property
    def answers(self) -> dict[str, Answer]:
        """Key -> answer, for the questions that were answered."""
        return {key: one for key, one in self.records.items() if one.error is None}

    @property
    def failures(self) -> dict[str, Answer]:
        """Key -> answer with its error, for the questions that failed."""
        return {key: one for key, one in self.records.items() if one.error is not None}

    def missing(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions without an answer. Failed questions count as missing."""
        answered = self.answers
        return [question for question in questions if question.key not in answered]

    def take(self, answer: Answer) -> None:
        """Store an answer in memory unless its question has one."""
        before = self.records.get(answer.key)
        if before is None or before.error is not None:
            self.records[answer.key] = answer

    def add(self, question: Question, answer: Answer) -> None:
        """Store an answer. It is on the disk when this returns."""
        assert self.file is not None, "a run that is only read takes no answers"
        answer = replace(answer, messages=question.messages, metadata=question.metadata)
        hint = "; the answers before are kept, the same command continues the run"
        with writing("--out", self.file.name, hint):
            _append(self.file, asdict(answer))
        self.take(answer)


def read_run(path: Path) -> Run:
    """Read the run in an `answers.jsonl`, without an incomplete last line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{path}: {reason}; give the answers.jsonl of a run") from error
    run, _ = _parse(path, data)
    if run is None:
        raise ConfigError(f"{path}: holds no settings and no answers; it is not the file of a run")
    return run


def _parse(path: Path, data: bytes) -> tuple[Run | None, int]:
    """Parse a run. Returns the run and the size of its complete lines.

    The run is None if the first line is incomplete.
    """
    whole = data.rfind(b"\n") + 1
    run: Run | None = None
    if not whole and not _HEAD.startswith(data[: len(_HEAD)]):
        raise ConfigError(f"{path}: is not the file of a run; repair or remove it")
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            if run is None:
                run = Run(_settings(entry))
                continue
            run.take(Answer.from_json(entry))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = "the settings of a run" if run is None else "an answer"
            raise ConfigError(
                f"{path}: line {number} is not {expected} ({type(error).__name__}: {error}); "
                "repair or remove the file"
            ) from error
    return run, whole


def _settings(entry: Mapping[str, Any]) -> RunSettings:
    if entry["format"] != _FORMAT:
        raise ValueError(f"format is {entry['format']!r}, this release reads {_FORMAT!r}")
    return RunSettings.from_json(entry["settings"])


@contextmanager
def open_store(path: Path, settings: RunSettings) -> Iterator[Run]:
    """Open the file of a new run, or of a run to be continued with the same settings.

    Raises:
        ConfigError: another process writes the file, the file is not a run's, or its run has other
            settings. The message names the first setting that differs.
    """
    with writing("--out", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out: another process writes to {path}; wait for it, or give another folder"
            ) from None
        file.seek(0)
        run, whole = _parse(path, file.read())
        if run is None:
            _begin(path, file, settings)
            run = Run(settings)
        elif differs := run.settings.differences(settings):
            name, (old, new) = next(iter(differs.items()))
            raise ConfigError(
                f"--out: {path} has answers of a run with {name} {old!r}, this one has {new!r}; "
                "give another folder, or the same settings"
            )
        else:
            file.truncate(whole)
        run.file = file
        yield run


def _begin(path: Path, file: BinaryIO, settings: RunSettings) -> None:
    with writing("--out", path):
        file.truncate(0)
        _append(file, {"format": _FORMAT, "settings": asdict(settings)})
        # makes the name of the file durable too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _append(file: BinaryIO, entry: Mapping[str, object]) -> None:
    """Write one line and wait until it is on the disk."""
    # ASCII escapes, because a lone surrogate has no UTF-8 form
    file.write(json.dumps(entry).encode("ascii") + b"\n")
    file.flush()
    os.fsync(file.fileno())
