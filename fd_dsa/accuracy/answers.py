"""The stored answers of a run, one JSON line each, written as soon as they arrive.

The first line holds the settings of the run. An interrupted run is opened again with the same
settings and asks the missing questions. An incomplete last line (the process or the machine died
during the write) is removed, and its question is asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import TypeAdapter, ValidationError

from fd_dsa.accuracy.scores import RunSettings, first_fault
from fd_dsa.client.questions import Answer, Question
from fd_dsa.command_line.inputs import read_bounded
from fd_dsa.command_line.outputs import append_line, lock
from fd_dsa.errors import ConfigError, shorten_text, system_reason, writing

MAX_RUN_BYTES = 2 << 30
"""Maximum size of a run, whose prompts have up to `MAX_PROMPT_TOKENS` tokens."""


@dataclass(frozen=True)
class _Head:
    """The first line of the file."""

    format: Literal["fd_dsa answers 1"]
    settings: RunSettings


_HEADS, _ANSWERS = TypeAdapter(_Head), TypeAdapter(Answer)
# first bytes of the file, also if its first line is incomplete
_BEGIN = b'{"format": "fd_dsa answers 1"'


@dataclass
class Run:
    """The content of a run's file.

    Attributes:
        answers: key -> answer, for the questions that were answered.
        failures: key -> answer with its error, for the other questions.
        file: file for further answers, or None for a run that is only read.
    """

    settings: RunSettings
    answers: dict[str, Answer] = field(default_factory=dict)
    failures: dict[str, Answer] = field(default_factory=dict)
    file: BinaryIO | None = None

    def missing(self, questions: Sequence[Question]) -> list[Question]:
        """Return the questions without an answer. Failed questions count as missing."""
        return [question for question in questions if question.key not in self.answers]

    def take(self, answer: Answer) -> None:
        """Store an answer in memory unless its question has one."""
        if answer.error is None:
            self.answers.setdefault(answer.key, answer)
            self.failures.pop(answer.key, None)
        elif answer.key not in self.answers:
            self.failures[answer.key] = answer

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
        data = read_bounded(path, MAX_RUN_BYTES)
    except OSError as error:
        reason = system_reason(error)
        name = shorten_text(str(path))
        raise ConfigError(f"{name}: {reason}; give the answers.jsonl of a run") from error
    run = _parse(path, data)
    if run is None:
        raise ConfigError(f"{path}: holds no settings and no answers; it is not the file of a run")
    return run


def _parse(path: Path, data: bytes) -> Run | None:
    """Parse the complete lines of a run. None = not even the first line is complete."""
    run: Run | None = None
    if b"\n" not in data and not _BEGIN.startswith(data[: len(_BEGIN)]):
        raise ConfigError(f"{path}: is not the file of a run; repair or remove it")
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            if run is None:
                run = Run(_HEADS.validate_json(line, strict=True).settings)
            else:
                run.take(_ANSWERS.validate_json(line, strict=True))
        except ValidationError as error:
            raise ConfigError(
                f"{path}: line {number}: {first_fault(error)}; repair or remove the file"
            ) from error
    return run


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
        if not lock(file):
            raise ConfigError(
                f"--out: another process writes to {path}; wait for it, or give another folder"
            )
        data = read_bounded(path, MAX_RUN_BYTES, "give another folder")
        run = _parse(path, data)
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
            file.truncate(data.rfind(b"\n") + 1)
        run.file = file
        yield run


def _begin(path: Path, file: BinaryIO, settings: RunSettings) -> None:
    with writing("--out", path):
        file.truncate(0)
        _append(file, asdict(_Head("fd_dsa answers 1", settings)))
        # makes the name of the file durable too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _append(file: BinaryIO, entry: Mapping[str, object]) -> None:
    """Write one line and wait until it is on the disk."""
    append_line(file, json.dumps(entry))
    os.fsync(file.fileno())
