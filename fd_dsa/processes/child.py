"""Child's side of a process that `fd_dsa.processes.parent` starts. Imports no other package."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
from multiprocessing.connection import Connection

from fd_dsa.signals import open_missing_streams


def connect_to_parent() -> Connection:
    """Connect to the parent, leave signals to it, and end with it.

    A child calls this first. The last two arguments of its command line are numbers of files that
    it has inherited: a socket to the parent, and a pipe that closes with the parent.
    """
    # the parent acts on signals to all processes, as from systemd; blocked signals would reach
    # another thread, such as a thread of NumPy's libraries
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    open_missing_streams()
    _end_with_parent(int(sys.argv[2]))
    return Connection(int(sys.argv[1]))


def _end_with_parent(descriptor: int) -> None:
    """Make the kernel kill this process, and those that it forks, when its parent has ended.

    A thread would wait for Python's lock, which a library may hold while it reads a dead disk.

    Args:
        descriptor: read end of a pipe whose write end only the parent has.
    """
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([descriptor], [], [], 0)[0]:
        # the parent had ended before
        os._exit(1)
