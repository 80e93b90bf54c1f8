"""The engine's process, started by the server.

Command line: `python -m fd_dsa.serve.engine_child SOCKET PIPE`.

It reads the configuration from the socket, builds the engine, and serves it until the other end
asks it to stop or closes the socket.
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

from fd_dsa.engine.loop import EngineDead, EngineLoop, EngineProperties, Event
from fd_dsa.errors import describe_error
from fd_dsa.processes.child import connect_to_parent
from fd_dsa.serve.heap import keep_heap_trimmed, share_heap, trim_heap
from fd_dsa.serve.info import INFO, engine_info
from fd_dsa.serve.logs import set_up_logging
from fd_dsa.startup.progress import StartupProgress

logger = logging.getLogger("fd_dsa.serve")


def _sender(connection: Connection) -> Callable[[Event], None]:
    """Return a thread-safe function that sends the events of the loop."""
    lock = threading.Lock()

    def emit(event: Event) -> None:
        if isinstance(event, EngineDead):
            event = EngineDead(_portable(event.error))
        # the server may be gone; the thread that reads the socket then ends the process
        with lock, contextlib.suppress(OSError):
            connection.send(event)

    return emit


def main() -> int:
    """Build the engine and serve it.

    Returns:
        The exit status.
    """
    # the HTTP process handles signals and drains
    connection = connect_to_parent()
    config, log_level, log_json = connection.recv()
    set_up_logging(log_level, as_json=log_json)
    share_heap()
    keep_heap_trimmed()
    loops: SimpleQueue[EngineLoop] = SimpleQueue()
    threading.Thread(
        target=_read, args=(connection, loops), name="fd_dsa-commands", daemon=True
    ).start()
    try:
        # imported late, because these imports take seconds
        from fd_dsa.startup.build import build_engine

        progress = StartupProgress(lambda *phase: connection.send(phase))
        engine = build_engine(config, progress)
    except Exception as error:
        logger.debug("the start failed", exc_info=True)
        connection.send(_portable(error))
        return 0
    # the files of weights and tokenizer have been read and freed
    trim_heap()
    loop = EngineLoop(engine, _sender(connection), {INFO: lambda _: engine_info(config)})
    loops.put(loop)
    ranks = engine.runner.info.ranks
    if ranks is not None:
        ranks.on_failure(lambda error: loop.post(EngineDead(error)))
    connection.send(EngineProperties.of(engine))
    return 0 if loop.run() else 1


def _read(connection: Connection, loops: SimpleQueue[EngineLoop]) -> None:
    """Run the thread that receives commands, and end the process when the socket closes.

    Args:
        connection: to the server, which sends its first command after the properties.
        loops: receives the loop when the engine is built.
    """
    loop: EngineLoop | None = None
    while True:
        try:
            command = connection.recv()
        except (EOFError, OSError):
            # the main thread may be inside a step, so there is no orderly end
            os._exit(0)
        loop = loop or loops.get()
        loop.post(command)


def _portable(error: BaseException) -> Exception:
    """Return an exception that can be pickled.

    Other exceptions become a RuntimeError with the same text.
    """
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return copy if isinstance(copy, Exception) else RuntimeError(describe_error(error))


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Paddle's own shutdown takes seconds, and all output has been written
    os._exit(status)
