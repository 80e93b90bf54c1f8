"""The answers of a run on disk: one JSON line each, there as soon as they came.

The first line holds the settings of the run. A run that was interrupted is opened again with the
same settings and asks what is missing; a last line without its end (the process or the machine
died while it was written) is cut off and its question asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from fd_dsa.accuracy.types import Answer, Question, RunSettings
from fd_dsa.errors import ConfigError, unwritable

_FORMAT = "fd_dsa answers 1"
# what even a torn first line begins with
_HEAD = json.dumps({"format": _FORMAT}).encode("ascii")[:-1]


@dataclass(frozen=True)
class Record:
    """One answer as it is kept.

    Attributes:
        answer: what the server said.
        messages: of the question.
        metadata: of the question, for scoring.
    """

    answer: Answer
    messages: tuple[dict[str, str], ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run as its file tells it.

    Attributes:
        settings: of the run.
        records: key -> its last record, in the order in which keys first came; a record with an
            answer is never replaced by one with an error.
    """

    settings: RunSettings
    records: dict[str, Record]

    @property
    def answers(self) -> dict[str, Answer]:
        """Key -> answer of the questions that were answered."""
        return {k: r.answer for k, r in self.records.items() if r.answer.error is None}

    @property
    def failures(self) -> dict[str, Answer]:
        """Key -> answer, with its error, of the questions that were not."""
        return {k: r.answer for k, r in self.records.items() if r.answer.error is not None}


def read_run(path: Path) -> Run:
    """The run in an `answers.jsonl`, a torn last line left aside.

    Raises:
        ConfigError: there is no such file, or it holds something else; names the line.
    """
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
    """The run (None where not even its first line is whole) and the bytes that whole lines take."""
    whole = data.rfind(b"\n") + 1
    settings: RunSettings | None = None
    records: dict[str, Record] = {}
    if not whole and not _HEAD.startswith(data[: len(_HEAD)]):
        raise ConfigError(f"{path}: is not the file of a run; repair or remove it")
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            if settings is None:
                settings = _settings(entry)
                continue
            record = Record(
                Answer.from_json(entry), tuple(entry.get("messages", ())), entry.get("metadata", {})
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = "the settings of a run" if settings is None else "an answer"
            raise ConfigError(
                f"{path}: line {number} is not {wanted} ({type(error).__name__}: {error}); "
                "repair or remove the file"
            ) from error
        before = records.get(record.answer.key)
        if before is None or before.answer.error is not None:
            records[record.answer.key] = record
    return (None if settings is None else Run(settings, records)), whole


def _settings(entry: Mapping[str, Any]) -> RunSettings:
    """The settings of the first line."""
    if entry["format"] != _FORMAT:
        raise ValueError(f"format is {entry['format']!r}, this release reads {_FORMAT!r}")
    return RunSettings.from_json(entry["settings"])


def differing_setting(kept: RunSettings, now: RunSettings) -> tuple[str, Any, Any] | None:
    """The first setting that two runs do not share: name, kept value, value now; None = none.

    What is unknown in one of them (None, or absent from `server`) is no difference.
    """
    for spec in fields(RunSettings):
        old, new = getattr(kept, spec.name), getattr(now, spec.name)
        if not isinstance(old, dict):
            if old != new:
                return spec.name, old, new
            continue
        for name in sorted({*old, *new}):
            one, other = old.get(name), new.get(name)
            unknown = spec.name == "server" and None in (one, other)
            if one != other and not unknown:
                return f"{spec.name}.{name}", one, other
    return None


class AnswerStore:
    """An `answers.jsonl` that is being written; made by `open_store`.

    Attributes:
        path: of the file.
        run: its content so far, kept up to date by `add`.
    """

    def __init__(self, path: Path, file: BinaryIO, run: Run) -> None:
        self.path = path
        self.run = run
        self._file = file

    def missing(self, questions: Sequence[Question]) -> list[Question]:
        """Those questions which have no answer yet, an error being none."""
        answered = self.run.answers
        return [question for question in questions if question.key not in answered]

    def add(self, question: Question, answer: Answer) -> None:
        """Keep one answer; it is on the disk when this returns.

        Raises:
            ConfigError: it cannot be written, as on a full disk; names the file.
        """
        entry = {**asdict(answer), "messages": question.messages, "metadata": question.metadata}
        try:
            _append(self._file, entry)
        except OSError as error:
            raise ConfigError(
                f"{unwritable('--out', self.path, error)}; the answers before are kept, the same "
                "command goes on with them"
            ) from error
        self.run.records[answer.key] = Record(answer, question.messages, question.metadata)


@contextmanager
def open_store(path: Path, settings: RunSettings) -> Iterator[AnswerStore]:
    """The store of a new run, or of one to be resumed, until the block ends.

    Args:
        path: of `answers.jsonl`; its folder is made.
        settings: of the run; those of a run to be resumed have to be the same.

    Raises:
        ConfigError: the folder cannot be written, another process has the file, it holds something
            else, or its run has other settings (names the first that differs).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise unwritable("--out", path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out: another process writes to {path}; wait for it, or give another folder"
            ) from None
        file.seek(0)
        run, whole = _parse(path, file.read())
        if run is not None:
            _refuse_other_settings(path, run.settings, settings)
        if run is None:
            _begin(path, file, settings)
            run = Run(settings, {})
        else:
            file.truncate(whole)
        yield AnswerStore(path, file, run)


def _begin(path: Path, file: BinaryIO, settings: RunSettings) -> None:
    """Write the first line in the place of what there is of one."""
    try:
        file.truncate(0)
        _append(file, {"format": _FORMAT, "settings": settings.to_json()})
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable("--out", path, error) from error


def _refuse_other_settings(path: Path, kept: RunSettings, now: RunSettings) -> None:
    """Raise if the two runs would not belong together."""
    found = differing_setting(kept, now)
    if found is not None:
        name, old, new = found
        raise ConfigError(
            f"--out: {path} has answers of a run with {name} {old!r}, this one has {new!r}; "
            "give another folder, or the same settings"
        )


def _append(file: BinaryIO, entry: Mapping[str, Any]) -> None:
    """Write one line and wait until it is on the disk."""
    # a lone surrogate has no UTF-8 form, as an escape it has
    file.write(json.dumps(entry).encode("ascii") + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the file's name as durable as its content."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
