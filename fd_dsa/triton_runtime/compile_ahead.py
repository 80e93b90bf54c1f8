"""Compilation of the kernels of many launches at once, while the launches themselves do nothing.

Triton's compiler holds Python's lock, so threads compile no faster than one. Processes do
(`compile_worker`). Their results are in Triton's cache on disk, where later launches find them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from fd_dsa.errors import describe_error
from fd_dsa.processes.parent import ChildProcess
from fd_dsa.triton_runtime.compiler import Argument

Kernel = TypeVar("Kernel")


class Order(NamedTuple):
    """Kernel to compile, and the arguments of `compile_kernel`.

    Attributes:
        module: module that defines the kernel.
        name: name of the kernel in its module.
        source_key: Triton's key of the kernel's source, in the process that will launch it.
    """

    module: str
    name: str
    source_key: str
    arguments: Mapping[str, Argument]
    options: Mapping[str, object]
    capability: int


class CompileAhead:
    """Kernels that processes compile, made by `compile_ahead`.

    Args:
        max_workers: maximum number of processes.

    Attributes:
        errors: text for each kernel that could not be compiled, after the end of `compile_ahead`.
    """

    COMMAND = (sys.executable, "-m", "fd_dsa.triton_runtime.compile_worker")
    """Command line, to which `ChildProcess` adds the numbers of a socket and a pipe."""

    def __init__(self, max_workers: int) -> None:
        # a thread waits for each process
        self._threads = ThreadPoolExecutor(max_workers, "fd_dsa-compile")
        self._futures: list[Future[str]] = []
        self._stand_ins: dict[object, Any] = {}
        self._workers: list[ChildProcess] = []
        self._idle: list[ChildProcess] = []
        self._lock, self._is_closed = threading.Lock(), False
        self.errors: list[str] = []

    @property
    def num_kernels(self) -> int:
        """Number of kernels that were ordered."""
        return len(self._futures)

    @property
    def num_workers(self) -> int:
        """Number of processes that were started."""
        return len(self._workers)

    def stand_in(self, kernel: Kernel, make: Callable[[Kernel, CompileAhead], Kernel]) -> Kernel:
        """Return what launches instead of a kernel, made by its first launch."""
        if kernel not in self._stand_ins:
            self._stand_ins[kernel] = make(kernel, self)
        found: Kernel = self._stand_ins[kernel]
        return found

    def add(self, order: Order) -> None:
        """Compile a kernel soon."""
        self._futures.append(self._threads.submit(self._compile, order))

    def _compile(self, order: Order) -> str:
        """Compile a kernel in an idle process or in a new one. Returns the error, or ""."""
        try:
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = self._new_worker()
            worker.connection.send(order)
            error: str = worker.connection.recv()
            self._idle.append(worker)
        except Exception as failure:
            # a process that has ended is not used again
            error = describe_error(failure)
        return f"kernel {order.name}: {error}" if error else ""

    def _new_worker(self) -> ChildProcess:
        """Start a process, which ends at once if `close` was called in between."""
        worker = ChildProcess(self.COMMAND)
        with self._lock:
            self._workers.append(worker)
            if self._is_closed:
                worker.kill()
        return worker

    def finish(self) -> None:
        """Wait for all kernels."""
        self.errors = [error for future in self._futures if (error := future.result())]

    def close(self) -> None:
        """End the processes and their threads, whatever they do."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._is_closed = True
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown()
        for worker in self._workers:
            worker.join(0.0)
            worker.connection.close()


class _Mode(threading.local):
    """Mode of a thread's launches.

    Attributes:
        ahead: compiles the kernels of launches, which then do nothing; None = kernels run.
    """

    ahead: CompileAhead | None = None


MODE = _Mode()
"""Mode of the calling thread. All that launches must read it, and do nothing if it has `ahead`."""


@contextmanager
def compile_ahead(max_workers: int) -> Iterator[CompileAhead]:
    """Compile the kernels of all launches inside, in processes. No launch runs.

    Launches of this thread only are meant. Work that does not read the results of kernels, such as
    copies and GEMMs, runs as usual on memory with arbitrary contents. The end waits for all
    kernels. Kernels that cannot be compiled are no error: a launch compiles them again.

    Args:
        max_workers: maximum number of processes.
    """
    ahead = CompileAhead(max_workers)
    try:
        MODE.ahead = ahead
        try:
            yield ahead
        finally:
            MODE.ahead = None
        ahead.finish()
    finally:
        ahead.close()
