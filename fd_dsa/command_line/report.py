"""Output of the commands: tables, Markdown pages, JSON, files.

The same figures give the same text. It has no date, duration, or path of this machine.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from fd_dsa.command_line.outputs import replace_files
from fd_dsa.errors import ConfigError, writing

# width of output to a file or a pipe, columns
_PLAIN_WIDTH = 120


@dataclass(frozen=True)
class Table:
    """A table. The first column is aligned left, the others right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the table as Markdown, with its title in bold."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines.append(_row(self.columns))
        lines.append(_row(["---", *["---:"] * (len(self.columns) - 1)]))
        lines += [_row(row) for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)

    def rich(self) -> RichTable:
        table = RichTable(box=box.SIMPLE_HEAD, show_edge=False)
        for i, column in enumerate(self.columns):
            side: Any = "left" if i == 0 else "right"
            table.add_column(column, justify=side, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def page(title: str, parts: Sequence[str | Table]) -> str:
    texts = [part.markdown() if isinstance(part, Table) else part for part in parts]
    return "\n\n".join([f"# {title}", *texts]) + "\n"


class Terminal(Console):
    """Console of a stream whose closed pipe is an error of the command, as with `print`."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, in place of rich's silent end with status 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def show(parts: Sequence[str | Table], console: Console | None = None) -> None:
    """Print the parts of a page on a terminal."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    out = console or Terminal(
        file=sys.stdout, width=width, highlight=False, markup=False, emoji=False
    )
    for part in parts:
        if isinstance(part, Table):
            out.print(*([f"\n{part.title}"] if part.title else []), part.rich(), sep="\n")
            for note in part.notes:
                out.print(note)
        else:
            out.print(part.replace("**", "").replace("`", ""))


def as_json(data: object) -> str:
    """Return JSON in the format of our files: indented, UTF-8, no NaN, final line break."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_folder(out: Path) -> None:
    """Raise ConfigError if `out` is not, or cannot become, a writable folder."""
    with writing("--out", out):
        is_there = out.exists()
    if is_there and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; give a folder")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out: {nearest} is not writable; give another folder")


def write_files(out: Path, files: Mapping[str, str]) -> None:
    """Write texts as files of a folder by `replace_files`. The folder is created if necessary.

    Raises:
        ConfigError: the folder cannot be written, for example on a full disk. The message names it.
    """
    check_folder(out)
    with writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        replace_files(out, files)


def publish(parts: Sequence[str | Table], out: Path | None, files: Mapping[str, str]) -> None:
    """Print the parts of a report. With a folder, also write the files to it."""
    show(parts)
    if out is not None:
        write_files(out, files)
        show([f"Written to {out}: {', '.join(files)}"])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
