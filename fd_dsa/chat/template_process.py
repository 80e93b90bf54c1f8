"""Templates of clients, each rendered in a process of its own."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fd_dsa.cancellation import check_cancelled
from fd_dsa.chat.sandbox import MAX_SECONDS, OverBudget, current
from fd_dsa.chat.template_child import MEMORY_MIB
from fd_dsa.processes.parent import ChildProcess

# time between two checks of the client, seconds
_CHECK_S = 0.05


class TemplateProcess:
    """A compiled template whose renderings run in a process of their own, one at a time.

    The process ends when a rendering exceeds a limit, or when its client leaves. The next rendering
    starts it again. It also ends with this object.

    Args:
        source: text of the template.

    Raises:
        TemplateSyntaxError, ValueError: the template does not compile.
    """

    COMMAND = (sys.executable, "-m", "fd_dsa.chat.template_child")
    """Command line, to which `ChildProcess` adds the numbers of a socket and a pipe."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process: ChildProcess | None = None
        with self._turn():
            self._running()

    def __call__(self, variables: Mapping[str, object]) -> str:
        """Return the text for these variables, see `Renderer`."""
        budget = current()
        with self._turn():
            message = dict(variables), budget.max_chars, budget.left_s
            result, seconds = self._ask(self._running(), message)
        budget.spend(seconds)
        if isinstance(result, Exception):
            try:
                raise result
            finally:
                # its traceback has this frame
                del result
        return str(result)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the rendering of another thread, as long as the client stays."""
        while not self._lock.acquire(timeout=_CHECK_S):
            check_cancelled()
        try:
            yield
        finally:
            self._lock.release()

    def _running(self) -> ChildProcess:
        """Return the process, which starts and compiles the template if it does not run."""
        if self._process is None:
            self._process = ChildProcess(self.COMMAND)
            self._end_process = weakref.finalize(self, self._process.join, 0.0)
            error = self._ask(self._process, self._source)
            if error is not None:
                self._end()
                raise error
        return self._process

    def _ask(self, process: ChildProcess, message: object) -> Any:
        """Return the answer to a message."""
        try:
            process.connection.send(message)
            while not process.connection.poll(_CHECK_S):
                check_cancelled()
            return process.connection.recv()
        except (EOFError, OSError):
            self._end()
            raise OverBudget(
                f"takes more than {MAX_SECONDS:g} s of processor time or {MEMORY_MIB} MiB of memory"
            ) from None
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        """End the process, which has been started."""
        self._process = None
        self._end_process()
