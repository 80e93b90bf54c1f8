"""Processes of the other ranks of an engine: their start, their steps, and their failures."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from fd_dsa.config import EngineConfig
from fd_dsa.distributed.host import HostGroup, Shared
from fd_dsa.errors import RankError, describe_error
from fd_dsa.processes.parent import ChildProcess

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
# a process that a user has stopped for less than this time may continue
_PATIENCE_S = 6.5
# a thread that waits for a device notices no failure: this process ends after this time
_NOTICE_S = 2.0
_END_TIMEOUT_S = 5.0


class Ranks:
    """All ranks of an engine but rank 0, which is this process.

    If a rank ends or stays stopped, the others are killed. Every wait of this process for them then
    raises an error that names the rank. If this process waits for a device instead, it ends.

    Attributes:
        group: group of rank 0.
        processes: processes of the ranks from 1 on, in this order.
    """

    COMMAND = (sys.executable, "-m", "fd_dsa.startup.rank")
    """Command line of a rank, to which `ChildProcess` adds the numbers of a socket and a pipe."""

    def __init__(self, config: EngineConfig) -> None:
        shared = Shared.create(config.tensor_parallel_size)
        self.group, self._pid = HostGroup(0, shared), os.getpid()
        self._lock = threading.Lock()
        self._is_closed = False
        # True while the engine's thread may wait for a device
        self._is_busy = True
        self._on_failure: Callable[[RankError], object] = lambda error: None
        self.processes: list[ChildProcess] = []
        try:
            for rank in range(1, self.group.size):
                self._start(rank, config, shared)
        except BaseException:
            self.close()
            raise

    def on_failure(self, call: Callable[[RankError], object]) -> None:
        """Call a function with the error, in another thread, when a rank has ended."""
        with self._lock:
            self._on_failure = call
            failure = self.group.failure
        if failure is not None:
            call(failure)

    @contextlib.contextmanager
    def step(self, message: bytes | None) -> Iterator[None]:
        """Send a message to all ranks. Inside, this rank runs the same step.

        Args:
            message: None = the other ranks have the step already.

        Raises:
            RankError: a rank has ended, or this rank fails inside, whose part is missing then.
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
        """Note that the start is over."""
        self._is_busy = False

    def close(self) -> None:
        """End all ranks. Further calls have no effect."""
        if os.getpid() != self._pid:
            # a process that a caller has forked also runs finalizers, with the same connections
            return
        with self._lock:
            is_first = not self._is_closed
            self._is_closed = True
        if not is_first:
            return
        if self.group.failure is None:
            self.group.failure = RankError("the ranks have been closed; make a new engine")
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.connection.send(None)
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        self.group.close()

    def _start(self, rank: int, config: EngineConfig, shared: Shared) -> None:
        """Start a rank and the thread that watches it."""
        process = ChildProcess(self.COMMAND, shared.descriptors)
        self.processes.append(process)
        with contextlib.suppress(OSError):
            # if the process has ended already, the thread reports it
            process.connection.send((config, rank, shared, logger.isEnabledFor(logging.DEBUG)))
        threading.Thread(
            target=self._watch, args=(rank, process), name=f"fd_dsa-rank-{rank}", daemon=True
        ).start()

    def _watch(self, rank: int, process: ChildProcess) -> None:
        """Read a rank's log and its final error until it has ended. Body of a thread."""
        reason, stopped_s = "", 0.0
        while stopped_s < _PATIENCE_S:
            if not process.connection.poll(_LOOK_EVERY_S):
                stopped_s = stopped_s + _LOOK_EVERY_S if process.is_stopped else 0.0
                continue
            try:
                message = process.connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, logging.LogRecord):
                message.msg = f"rank {rank}: {message.msg}"
                logging.getLogger(message.name).handle(message)
            else:
                reason = f"failed: {message}"
        else:
            reason = f"was stopped for {_PATIENCE_S:g} s by a signal such as SIGSTOP"
        reason = reason or "".join(process.how_ended())
        self._fail(RankError(f"rank {rank} (process {process.pid}) {reason}"))
        deadline = time.monotonic() + _NOTICE_S
        while self.group.has_devices and self._is_busy and not self._is_closed:
            if time.monotonic() > deadline:
                logger.error("%s; this process waits for a device, so it ends", self.group.failure)
                os._exit(1)
            time.sleep(_LOOK_EVERY_S / 10)

    def _fail(self, failure: RankError) -> None:
        """Kill all ranks because of the first failure. Later ones have no effect."""
        with self._lock:
            if self._is_closed or self.group.failure is not None:
                return
            self.group.failure = failure
            call = self._on_failure
        for process in self.processes:
            process.kill()
        call(failure)
