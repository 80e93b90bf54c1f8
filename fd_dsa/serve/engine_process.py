"""The engine in a process of its own, as the HTTP process sees it.

The event loop, parsing and tokenization share Python's lock among their threads. In one process
with the engine they would take it from each step: one busy thread makes a decode step of the demo
model four times as long. vLLM and SGLang part the two in the same way.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

from fd_dsa.config import EngineConfig
from fd_dsa.engine.host import (
    SNAPSHOT,
    Ask,
    Command,
    EngineFacts,
    EngineLink,
    Event,
    Failed,
    Stop,
)
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import FdDsaError
from fd_dsa.processes.parent import ChildProcess
from fd_dsa.startup.progress import StartupProgress

# time for the last event to arrive once the process has ended, seconds
_LAST_EVENT_S = 5.0
HEARTBEAT_S = 1.0
"""Time between two questions by which the process shows that it is alive, seconds."""
# the answer matters less than that there is one
_HEARTBEAT = Ask("heartbeat", SNAPSHOT)


class EngineProcess(EngineLink):
    """A link to an engine in a process of its own.

    The process ends when this one does, however it ends: its end of the socket is closed then.

    Raises:
        ConfigError: as `fd_dsa.startup.build.build_engine`; so are the others.
        FdDsaError: the process ended before the engine was ready.
    """

    COMMAND = (sys.executable, "-m", "fd_dsa.serve.engine_child")
    """Command line of the process, to which the number of its socket is added."""

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
            # beside the other process, which reads the same files among others: its error, if
            # there is one, names the first thing that is wrong
            loading = ThreadPoolExecutor(1).submit(
                Tokenizer.from_folder, config.tokenizer_path, config.chat_template
            )
            self.facts = self._wait_until_ready(progress)
            self.tokenizer = loading.result()
        except BaseException:
            self._process.join(0.0)
            raise
        self._commands: SimpleQueue[Command] = SimpleQueue()
        # when the oldest message was sent that nothing has come after, seconds of time.monotonic()
        self._waiting_since: float | None = None

    @property
    def silent_s(self) -> float:
        """See `EngineLink`; a frozen process is noticed after `HEARTBEAT_S`."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self, receive: Callable[[Event], None]) -> None:
        self.start_thread(lambda: self._read(receive))
        threading.Thread(target=self._write, name="fd_dsa-engine-commands", daemon=True).start()

    def post(self, command: Command) -> None:
        """Send a command; a thread writes it, so nobody waits for a full socket."""
        self._commands.put(command)

    def join(self, timeout_s: float) -> None:
        """Wait until the process has ended; kill it after `timeout_s`."""
        self._process.join(timeout_s)
        super().join(_LAST_EVENT_S)

    def _wait_until_ready(self, progress: StartupProgress) -> EngineFacts:
        """The facts of the engine, as soon as it serves.

        The process sends its phases as they come, their number and how far they are, and in the
        end its facts or the exception that ended the start.
        """
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                raise self._ended("before it was ready") from None
            if isinstance(message, Exception):
                raise message
            if isinstance(message, EngineFacts):
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
            if isinstance(command, Stop):
                self._is_stopping = True
            now = time.monotonic()
            commands = [command]
            if now >= next_heartbeat and command is not _HEARTBEAT:
                commands.append(_HEARTBEAT)
            try:
                # before a send, which waits for as long as a frozen process reads nothing
                self._waiting_since = self._waiting_since or now
                for one in commands:
                    self._connection.send(one)
            except OSError:
                # the thread that reads says what has happened
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
            if isinstance(event, Failed):
                return
        if not self._is_stopping:
            receive(Failed(self._ended("while it served")))
