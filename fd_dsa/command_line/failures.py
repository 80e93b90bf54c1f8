"""Failures of a command: one line on stderr, and an exit status."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence

from fd_dsa.commands import core_command
from fd_dsa.errors import FdDsaError, RemoteError, describe_error, shorten_text

EXIT_BAD_START = 2
"""Exit status of a command whose flags, files or model are refused."""


def fail(message: str, status: int) -> int:
    """Print the error line of a command, and return its exit status, `status`."""
    sys.stderr.write(f"fd_dsa: error: {message}\n")
    return status


def describe_system_error(error: OSError) -> str:
    """Return the text of an error of the system, with the remedy for an error without a file."""
    if error.filename is None and error.errno == errno.ENOENT and _is_folder_gone():
        return "the current folder does not exist any more; change to another one"
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = os.strerror(error.errno).lower()
        return f"an output cannot be written ({reason}); make room, or write it elsewhere"
    return shorten_text(str(error))


def describe_import_error(error: ImportError) -> str:
    """Return the text of a required package that is missing or broken, with the remedies.

    Raises:
        ImportError: the module is one of fd_dsa.
    """
    if (error.name or "").partition(".")[0] == "fd_dsa":
        raise error
    # pip leaves a package that is there and broken
    flags = () if isinstance(error, ModuleNotFoundError) else ("--force-reinstall",)
    return (
        f"a required package cannot be imported ({describe_error(error)}) by {sys.executable}; "
        f"use the Python that has the packages, or install them here by "
        f"{core_command(*flags)}"
    )


def _is_folder_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def reports_failures(run: Callable[[list[str]], int]) -> Callable[..., int]:
    """Make the `main` function of a command, which returns an exit status.

    The status is that of `run`, 1 if a server went away, or 2 for a bad start. `main` takes the
    arguments of the command, or None for those of the process. The caller handles signals, by
    `fd_dsa.signals.command`.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            return run(list(sys.argv[1:] if argv is None else argv))
        except RemoteError as error:
            return fail(str(error), 1)
        except BrokenPipeError:
            raise
        except FdDsaError as error:
            return fail(str(error), EXIT_BAD_START)
        except OSError as error:
            return fail(describe_system_error(error), EXIT_BAD_START)

    return main
