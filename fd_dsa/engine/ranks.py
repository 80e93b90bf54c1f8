"""The other ranks of an engine: processes that it starts, sends its steps, and keeps an eye on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from fd_dsa.config import EngineConfig
from fd_dsa.distributed.host import HostGroup, Shared
from fd_dsa.errors import RankError, describe_error

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
# a process that a user has stopped may go on for so long as if nothing had been
_PATIENCE_S = 6.5
# a thread that waits for a device notices nothing, and has so long until the process ends
_NOTICE_S = 2.0
_END_TIMEOUT_S = 5.0


class Ranks:
    """All ranks of an engine but the first, which is this process. They end with it.

    Where one ends or stays stopped, the others are killed, and every wait of this process for them
    raises the error that names it. If this process waits for a device instead, it ends.

    Attributes:
        group: this process's.
        processes: of the other ranks, by rank from 1 on.
    """

    COMMAND = (sys.executable, "-m", "fd_dsa.engine.rank")
    """Command line of a rank, to which the number of its socket is added."""

    def __init__(self, config: EngineConfig) -> None:
        shared = Shared.create(config.tensor_parallel_size)
        self.group = HostGroup(0, shared)
        self._lock = threading.Lock()
        self._is_closed = False
        # whether the engine's thread may wait for a device
        self._is_busy = True
        self._on_failure: Callable[[RankError], object] = lambda error: None
        self.processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        try:
            for rank in range(1, self.group.size):
                self._start(rank, config, shared)
        except BaseException:
            self.close()
            raise

    def on_failure(self, call: Callable[[RankError], object]) -> None:
        """Have a function called, in another thread, when a rank has ended."""
        with self._lock:
            self._on_failure = call
            failure = self.group.failure
        if failure is not None:
            call(failure)

    @contextlib.contextmanager
    def step(self, message: bytes | None) -> Iterator[None]:
        """Send a message to all ranks, if there is one; inside, this rank does what it says.

        Raises:
            RankError: a rank has ended, or this one fails inside: it cannot be left out.
        """
        self.group.check()
        self._is_busy = True
        try:
            if message is not None:
                self.group.send(message)
            yield
        except RankError:
            raise
        except BaseException as error:
            failure = RankError(f"rank 0 failed in a step: {describe_error(error)}")
            self._fail(failure)
            if isinstance(error, Exception):
                raise failure from error
            raise
        finally:
            self._is_busy = False

    def ready(self) -> None:
        """The start is over."""
        self._is_busy = False

    def close(self) -> None:
        """End all ranks; may be called twice."""
        with self._lock:
            is_first = not self._is_closed
            self._is_closed = True
        if not is_first:
            return
        if self.group.failure is None:
            self.group.failure = RankError("the ranks have been closed; make a new engine")
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.group.close()

    def _start(self, rank: int, config: EngineConfig, shared: Shared) -> None:
        """Start a rank and the thread that watches it."""
        process, connection = start_process(self.COMMAND, shared.descriptors)
        self.processes.append(process)
        self._connections.append(connection)
        with contextlib.suppress(OSError):
            # where it has ended already, the thread says how
            connection.send((config, rank, shared, logger.isEnabledFor(logging.DEBUG)))
        threading.Thread(
            target=self._watch,
            args=(rank, process, connection),
            name=f"fd_dsa-rank-{rank}",
            daemon=True,
        ).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes], connection: Connection) -> None:
        """Body of the thread that reads a rank's log and its last words, until it has ended."""
        reason, stopped_s = "", 0.0
        while stopped_s < _PATIENCE_S:
            if not connection.poll(_LOOK_EVERY_S):
                stopped_s = stopped_s + _LOOK_EVERY_S if _is_stopped(process.pid) else 0.0
                continue
            try:
                message = connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, logging.LogRecord):
                message.msg = f"rank {rank}: {message.msg}"
                logging.getLogger(message.name).handle(message)
            else:
                reason = f"failed: {message}"
        else:
            reason = f"was stopped for {_PATIENCE_S:g} s by a signal, as SIGSTOP"
        self._fail(
            RankError(
                f"rank {rank} (process {process.pid}) {reason or ''.join(how_ended(process))}"
            )
        )
        deadline = time.monotonic() + _NOTICE_S
        while self.group.has_devices and self._is_busy and not self._is_closed:
            if time.monotonic() > deadline:
                logger.error("%s; this process waits for a device, so it ends", self.group.failure)
                os._exit(1)
            time.sleep(_LOOK_EVERY_S / 10)

    def _fail(self, failure: RankError) -> None:
        """End everything because of a rank; the first failure counts."""
        with self._lock:
            if self._is_closed or self.group.failure is not None:
                return
            self.group.failure = failure
            call = self._on_failure
        for process in self.processes:
            process.kill()
        call(failure)


def _is_stopped(pid: int) -> bool:
    """Whether a process has got SIGSTOP or the like."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "T"


def start_process(
    command: Sequence[str], descriptors: Sequence[int] = ()
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a process and connect to it.

    Its last arguments are the number of its socket and that of the pipe for `end_with_starter`.

    Args:
        descriptors: of files that it has too.
    """
    ours, theirs = socket.socketpair()
    life, own_life = os.pipe()
    with theirs:
        number = theirs.fileno()
        try:
            process = subprocess.Popen(
                (*command, str(number), str(life)),
                pass_fds=(number, life, *descriptors),
                stdin=subprocess.DEVNULL,
                # Ctrl-C of a terminal is for this process
                start_new_session=True,
            )
        except BaseException:
            os.close(own_life)
            raise
        finally:
            os.close(life)
    # the pipe lives as long as the object, at most as long as this process
    weakref.finalize(process, os.close, own_life)
    return process, Connection(ours.detach())


def how_ended(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """How a process has ended whose connection has, in words, and what may be the cause."""
    try:
        status = process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "ended its connection but not itself", ""
    if status < 0:
        hint = "; the system may have been out of memory" if status == -signal.SIGKILL else ""
        return f"ended by signal {-status} ({signal.Signals(-status).name})", hint
    return f"ended with status {status}", ""
