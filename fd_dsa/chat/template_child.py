"""Process of one template of a client: `python -m fd_dsa.chat.template_child SOCKET PIPE`.

The kernel ends the process at its limit of processor time. Allocations beyond its limit of memory
fail. So no operation of a template needs a limit of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from fd_dsa.chat.sandbox import MAX_SECONDS, OverBudget, bounded_rendering, compile_template
from fd_dsa.processes.child import connect_to_parent
from fd_dsa.processes.limits import (
    address_space,
    expect_end,
    limit_address_space,
    processor_time,
)

MEMORY_MIB = 256
"""Memory of a template's values, MiB."""
MAX_REASON_CHARS = 1000
"""Maximum length of an error's text, which a template may quote from values of any size."""
# time for the budget's own error, after which the process can go on, seconds
_GRACE_S = 0.2
# errors that the parent distinguishes
_KINDS = (TemplateSyntaxError, OverBudget, RecursionError, MemoryError)


def main() -> int:
    """Compile the template, and render it until the parent closes the connection.

    The first message is the source, and its answer an error or None. Further messages are
    variables, maximum characters and seconds. Their answers are the text or an error, and the
    seconds of processor time.

    Returns:
        The exit status.
    """
    connection = connect_to_parent()
    expect_end()
    limit_address_space(address_space() + MEMORY_MIB * 2**20)
    try:
        source = connection.recv()
        with processor_time(MAX_SECONDS):
            template = _result(compile_template, source)
        connection.send(template if isinstance(template, Exception) else None)
        while True:
            variables, *limits = connection.recv()
            begin_s = time.process_time()
            with processor_time(limits[1] + _GRACE_S), bounded_rendering(*limits):
                result = _result(template, variables)
            connection.send((result, time.process_time() - begin_s))
    except (EOFError, OSError):
        return 0


def _result(work: Callable[[Any], Any], argument: object) -> Any:
    """Return the result of the work, or an error that the parent can raise."""
    try:
        return work(argument)
    except _KINDS as error:
        return error
    except Exception as error:
        return ValueError(str(error)[:MAX_REASON_CHARS])


if __name__ == "__main__":
    sys.exit(main())
