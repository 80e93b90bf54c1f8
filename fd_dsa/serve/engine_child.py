"""The engine's process: `python -m fd_dsa.serve.engine_child SOCKET PIPE`, started by the server.

Reads what to build and how to log from the socket, builds the engine, and serves it until the other
end asks it to stop or is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue

from fd_dsa.engine.host import EngineFacts, EngineHost, Event, Failed
from fd_dsa.errors import describe_error
from fd_dsa.processes.child import connect_to_parent
from fd_dsa.serve.heaps import keep_heaps_trimmed, share_heaps, trim_heaps
from fd_dsa.serve.info import INFO, engine_info
from fd_dsa.serve.logs import set_up_logging
from fd_dsa.startup.progress import StartupProgress

logger = logging.getLogger("fd_dsa.serve")


def _sender(connection: Connection) -> Callable[[Event], None]:
    """What sends the events of the host; called in several threads."""
    lock = threading.Lock()

    def emit(event: Event) -> None:
        if isinstance(event, Failed):
            event = Failed(_portable(event.error))
        # nobody may be there any more; the thread that reads ends the process then
        with lock, contextlib.suppress(OSError):
            connection.send(event)

    return emit


def main() -> int:
    """Build the engine and serve it; returns the exit status."""
    # the HTTP process drains on signals
    connection = connect_to_parent()
    config, log_level, log_json = connection.recv()
    set_up_logging(log_level, as_json=log_json)
    share_heaps()
    keep_heaps_trimmed()
    hosts: SimpleQueue[EngineHost] = SimpleQueue()
    threading.Thread(
        target=_read, args=(connection, hosts), name="fd_dsa-commands", daemon=True
    ).start()
    try:
        # the imports take seconds
        from fd_dsa.startup.build import build_engine

        progress = StartupProgress(lambda *phase: connection.send(phase))
        engine = build_engine(config, progress)
    except Exception as error:
        logger.debug("the start failed", exc_info=True)
        connection.send(_portable(error))
        return 0
    # files of weights and tokenizer have been read
    trim_heaps()
    host = EngineHost(engine, _sender(connection), {INFO: lambda _: engine_info(config)})
    hosts.put(host)
    ranks = engine.runner.info.ranks
    if ranks is not None:
        ranks.on_failure(lambda error: host.post(Failed(error)))
    connection.send(EngineFacts.of(engine))
    return 0 if host.run() else 1


def _read(connection: Connection, hosts: SimpleQueue[EngineHost]) -> None:
    """Body of the thread that takes commands; ends the process when nobody sends any more.

    Args:
        connection: to the other process, which sends no command before it has the facts.
        hosts: gets the host as soon as there is one.
    """
    host: EngineHost | None = None
    while True:
        try:
            command = connection.recv()
        except (EOFError, OSError):
            # in the middle of whatever is under way
            os._exit(0)
        host = host or hosts.get()
        host.post(command)


def _portable(error: BaseException) -> Exception:
    """An exception that can be sent; others become one that names them."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return copy if isinstance(copy, Exception) else RuntimeError(describe_error(error))


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Paddle's own end takes seconds, and nothing is left to be written
    os._exit(status)
