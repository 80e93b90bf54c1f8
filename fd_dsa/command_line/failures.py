"""Failures of a command: one line on stderr, and an exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from fd_dsa.errors import FdDsaError, RemoteError

EXIT_BAD_START = 2
"""Exit status of a command whose flags, files or model are refused."""


def fail(message: str, status: int) -> int:
    """Print the error line of a command, and return its exit status, `status`."""
    sys.stderr.write(f"fd_dsa: error: {message}\n")
    return status


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
        except (FdDsaError, OSError) as error:
            return fail(str(error), EXIT_BAD_START)

    return main
