"""Parent's side of a child process: its start, the connection to it, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

# time that a process needs to end once it was killed or has closed its connection, seconds
_END_TIMEOUT_S = 5.0
_started: weakref.WeakSet[ChildProcess] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """Close a forked process's copies of the pipes that end children with the parent."""
    for child in _started:
        child._end_life()


os.register_at_fork(after_in_child=_leave_to_parent)


class ChildProcess:
    """Child process and the connection to it, in a session of its own.

    The kernel ends the child when this object or this process is gone, whatever the child does. A
    process that this one has forked does not keep the child.

    Args:
        command: command line, to which the numbers of a socket and of a pipe are added. Its program
            calls `fd_dsa.processes.child.connect_to_parent`.
        descriptors: open files that the child inherits.

    Raises:
        OSError: the system can start no further process.

    Attributes:
        pid: id of the process.
        connection: connection to `connect_to_parent` of the child.
    """

    def __init__(self, command: Sequence[str], descriptors: Sequence[int] = ()) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            life, own_life = os.pipe()
            number = theirs.fileno()
            try:
                self._process = subprocess.Popen(
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
            self.connection = Connection(ours.detach())
        self._end_life = weakref.finalize(self, os.close, own_life)
        _started.add(self)
        self.pid = self._process.pid

    @property
    def is_running(self) -> bool:
        """True until the process has ended."""
        return self._process.poll() is None

    @property
    def is_stopped(self) -> bool:
        """True while a signal such as SIGSTOP has stopped the process."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state == "T"

    def kill(self) -> None:
        """Send SIGKILL without waiting for the end."""
        self._process.kill()

    def join(self, timeout_s: float) -> None:
        """Wait until the process has ended, and kill it after `timeout_s`.

        The call also returns if the kernel cannot end the process, as one that waits for a dead
        disk.

        Args:
            timeout_s: seconds; 0 = kill at once.
        """
        for timeout in (timeout_s, _END_TIMEOUT_S):
            try:
                self._process.wait(timeout)
                return
            except subprocess.TimeoutExpired:
                self._process.kill()

    def how_ended(self) -> tuple[str, str]:
        """Describe the end of a process that has closed its connection.

        Returns:
            The end in words, and a hint at its cause, which may be "".
        """
        try:
            status = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "ended its connection but not itself", ""
        if status < 0:
            hint = "; the system may have been out of memory" if status == -signal.SIGKILL else ""
            return f"ended by signal {-status} ({signal.Signals(-status).name})", hint
        return f"ended with status {status}", ""
