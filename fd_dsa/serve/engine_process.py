"""The HTTP process's side of an engine that runs in its own process.

The event loop, parsing and tokenization share Python's lock among their threads. In the engine's
process they would hold the lock during steps: one busy thread makes a decode step of the demo model
four times as long. vLLM and SGLang separate the two in the same way.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

from fd_dsa.config import EngineConfig
from fd_dsa.engine.loop import (
    SNAPSHOT,
    Command,
    EngineClient,
    EngineDead,
    EngineProperties,
    Event,
    Shutdown,
    UtilityCall,
)
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import FdDsaError
from fd_dsa.processes.parent import ChildProcess
from fd_dsa.startup.progress import StartupProgress

# time for the last event to arrive once the process has ended, seconds
_LAST_EVENT_S = 5.0
HEARTBEAT_S = 1.0
"""Time between two heartbeat calls to the process, seconds."""
# any answer shows that the process is alive
_HEARTBEAT = UtilityCall("heartbeat", SNAPSHOT)


class EngineProcess(EngineClient):
    """Client of an engine in its own process.

    The process ends when this one does, because its end of the socket closes.

    Raises:
        ConfigError: like `fd_dsa.startup.build.build_engine`, as are further errors of the start.
        FdDsaError: the process ended before the engine was ready.
    """

    COMMAND = (sys.executable, "-m", "fd_dsa.serve.engine_child")
    """Command line of the process, without the numbers of its socket and pipe."""

    def __init__(
        self,
        config: EngineConfig,
        progress: StartupProgress,
        log_level: str = "info",
        log_json: bool = False,
    ) -> None:
        self._process = ChildProcess(self.COMMAND)
        self._connection = self._process.connection
        self.pid = self._process.pid
        self._is_stopping = False
        try:
            self._connection.send((config, log_level, log_json))
            # load the tokenizer while the other process loads the model; if both fail, the error of
            # the other process is the one to show
            loading = ThreadPoolExecutor(1).submit(
                Tokenizer.from_folder, config.tokenizer_path, config.chat_template
            )
            self.properties = self._wait_until_ready(progress)
            self.tokenizer = loading.result()
        except BaseException:
            self._process.join(0.0)
            raise
        self._commands: SimpleQueue[Command] = SimpleQueue()
        # time.monotonic() of the oldest message without an answer, seconds
        self._waiting_since: float | None = None

    @property
    def silent_s(self) -> float:
        """See `EngineClient`. A frozen process is noticed after `HEARTBEAT_S`."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self, receive: Callable[[Event], None]) -> None:
        self.start_thread(lambda: self._read(receive))
        threading.Thread(target=self._write, name="fd_dsa-engine-commands", daemon=True).start()

    def post(self, command: Command) -> None:
        """Enqueue a command.

        A thread sends it, so that a full socket does not block the caller.
        """
        self._commands.put(command)

    def join(self, timeout_s: float) -> None:
        """Wait until the process has ended, and kill it after `timeout_s`."""
        self._process.join(timeout_s)
        super().join(_LAST_EVENT_S)

    def _wait_until_ready(self, progress: StartupProgress) -> EngineProperties:
        """Wait for the engine's properties and report the progress of its start.

        The process sends each phase with its number and progress. At the end it sends the
        properties, or the exception that ended the start.
        """
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                raise self._ended("before it was ready") from None
            if isinstance(message, Exception):
                raise message
            if isinstance(message, EngineProperties):
                return message
            progress.follow(*message)

    def _ended(self, when: str) -> FdDsaError:
        how, hint = self._process.how_ended()
        return FdDsaError(f"the engine's process {how} {when}{hint}")

    def _write(self) -> None:
        next_heartbeat = 0.0
        while True:
            try:
                command: Command = self._commands.get(timeout=HEARTBEAT_S)
            except Empty:
                command = _HEARTBEAT
            if isinstance(command, Shutdown):
                self._is_stopping = True
            now = time.monotonic()
            commands = [command]
            if now >= next_heartbeat and command is not _HEARTBEAT:
                commands.append(_HEARTBEAT)
            try:
                # set before `send`, which blocks while a frozen process reads no messages
                self._waiting_since = self._waiting_since or now
                for one in commands:
                    self._connection.send(one)
            except OSError:
                # the reading thread reports the failure
                return
            next_heartbeat = now + HEARTBEAT_S

    def _read(self, receive: Callable[[Event], None]) -> None:
        while True:
            try:
                event = self._connection.recv()
            except (EOFError, OSError):
                break
            self._waiting_since = None
            receive(event)
            if isinstance(event, EngineDead):
                return
        if not self._is_stopping:
            receive(EngineDead(self._ended("while it served")))
