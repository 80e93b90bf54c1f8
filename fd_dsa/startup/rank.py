"""Process of a further rank: `python -m fd_dsa.startup.rank SOCKET PIPE`, started by `Ranks`.

The process builds its part of the model, then runs the steps that rank 0 sends.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from queue import SimpleQueue

from fd_dsa.distributed.host import HostGroup
from fd_dsa.errors import FdDsaError, describe_error
from fd_dsa.processes.child import connect_to_parent


class _Relay(QueueHandler):
    """Forwards log records and the final error to rank 0, from any thread."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(SimpleQueue())
        self._connection, self._one_at_a_time = connection, threading.Lock()

    def enqueue(self, record: object) -> None:
        """Send a record or a text."""
        with self._one_at_a_time:
            self._connection.send(record)


def main() -> None:
    """Build the runner of this rank and run the steps of rank 0, until the process ends."""
    connection = connect_to_parent()
    config, rank, shared, debug = connection.recv()
    threading.Thread(target=_end_when_closed, args=(connection,), daemon=True).start()
    relay = _Relay(connection)
    log = logging.getLogger("fd_dsa")
    log.addHandler(relay)
    log.propagate = False
    # rank 0 makes the same plan, and logs its warnings
    log.setLevel(logging.DEBUG if debug else logging.ERROR)
    try:
        group = HostGroup(rank, shared)
        # the imports take seconds
        from fd_dsa.startup.build import build_runner
        from fd_dsa.startup.plan import make_plan
        from fd_dsa.startup.progress import StartupProgress

        plan = make_plan(config, group)
        from fd_dsa.runner.ranks import WorkerRunner

        log.setLevel(logging.DEBUG if debug else logging.WARNING)
        runner = build_runner(plan, group, StartupProgress(), WorkerRunner)
        runner.serve(group.receive)
    except BaseException as error:
        relay.enqueue(str(error) if isinstance(error, FdDsaError) else describe_error(error))
    finally:
        os._exit(1)


def _end_when_closed(connection: Connection) -> None:
    """End this process when rank 0 sends a message or is gone. Body of a thread."""
    with suppress(EOFError, OSError):
        connection.recv()
    os._exit(0)


if __name__ == "__main__":
    main()
