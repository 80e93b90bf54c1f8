"""Engine's side of the processes that compile and follow grammars (`fd_dsa.grammars`)."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle

from fd_dsa.engine.grammar_vocabulary import GrammarVocabulary
from fd_dsa.grammars.messages import (
    COMPILE_S,
    MEMORY_MIB,
    TOKENS_S,
    Compile,
    Compiled,
    Done,
    Forget,
    Kind,
    Vocabulary,
    Work,
)
from fd_dsa.processes.parent import ChildProcess

# usual processor time of an output's work, and further time after which the niceness of a worker
# grows by 1, seconds
_USUAL_S, _NICE_EVERY_S = 0.002, 0.01
_MAX_NICE = 19
# maximum time for which steps wait for one grammar: in one step, seconds, and as a share of time
_PATIENCE_S, _PATIENCE_SHARE = 0.05, 0.125
_TOO_COMPLEX = (
    f"the grammar is too complex: its next token takes more than {TOKENS_S:g} s of processor time "
    f"or {MEMORY_MIB} MiB of memory; simplify its ambiguous rules"
)


class WorkerSource:
    """Process that forks a worker for each grammar, for all engines of this process.

    It starts with the first vocabulary, and again if it has ended.

    Attributes:
        process: the process that forks the workers; None before the first vocabulary.
    """

    COMMAND = (sys.executable, "-m", "fd_dsa.grammars.worker")
    """Command line, to which `ChildProcess` adds the numbers of a socket and a pipe."""

    def __init__(self) -> None:
        # `compile` adds a vocabulary again after a new start
        self._lock = threading.RLock()
        self.process: ChildProcess | None = None
        self._numbers: weakref.WeakKeyDictionary[GrammarVocabulary, int] = (
            weakref.WeakKeyDictionary()
        )
        self._next_number = itertools.count()
        # numbers of freed vocabularies in the running process; any thread appends
        self._gone: deque[int] = deque()
        atexit.register(self._close)

    def add(self, vocabulary: GrammarVocabulary) -> str | None:
        """Send a vocabulary to the process, which takes half a second for 129,280 tokens.

        Returns:
            The reason if llguidance refuses the vocabulary, else None.
        """
        with self._lock:
            connection, number = self._running(), next(self._next_number)
            connection.send(
                Vocabulary(
                    number,
                    vocabulary.tokens,
                    vocabulary.special_token_ids,
                    vocabulary.end_token_ids,
                    vocabulary.names,
                )
            )
            refusal: str | None = connection.recv()
            if refusal is None:
                self._numbers[vocabulary] = number
                weakref.finalize(vocabulary, self._gone.append, number)
            return refusal

    def compile(
        self, vocabulary: GrammarVocabulary, forms: tuple[tuple[Kind, str], ...], max_states: int
    ) -> GrammarProcess | str:
        """Compile a grammar in a new worker.

        Returns:
            The worker, or the reason for an error.
        """
        try:
            ours, theirs = socket.socketpair()
            connection = Connection(ours.detach())
            with theirs, self._lock:
                try:
                    self._order(vocabulary, forms, max_states, theirs.fileno())
                except (EOFError, OSError):
                    # the process has ended since the last grammar
                    self.process = None
                    self._order(vocabulary, forms, max_states, theirs.fileno())
        except (EOFError, OSError) as error:
            return f"no process can be started for it: {str(error) or 'it has ended'}"
        try:
            compiled: Compiled = connection.recv()
        except (EOFError, OSError):
            return (
                f"the grammar is too complex: it takes more than {COMPILE_S:g} s of processor time "
                f"or {MEMORY_MIB} MiB of memory to compile"
            )
        return compiled.error or GrammarProcess(connection, compiled.pid)

    def _order(
        self,
        vocabulary: GrammarVocabulary,
        forms: tuple[tuple[Kind, str], ...],
        max_states: int,
        descriptor: int,
    ) -> None:
        """Send a grammar, with the worker's end of a socket."""
        connection = self._running()
        while self._gone:
            connection.send(Forget(self._gone.popleft()))
        if vocabulary not in self._numbers:
            self.add(vocabulary)
        connection.send(Compile(self._numbers[vocabulary], forms, max_states))
        send_handle(connection, descriptor, None)

    def _running(self) -> Connection:
        """Return the connection to the process, which starts if it does not run."""
        if self.process is None or not self.process.is_running:
            self.process = ChildProcess(self.COMMAND)
            self._numbers.clear()
        return self.process.connection

    def _close(self) -> None:
        """End the process. Its workers end when their connections are closed."""
        if self.process is not None:
            self.process.join(0.0)


WORKERS = WorkerSource()


class Patience:
    """Budget of waiting time, which grows by a share of the time that passes.

    Args:
        max_s: maximum of the budget, and its first value, seconds.
        share: growth of the budget as a share of the time.
    """

    def __init__(self, max_s: float, share: float) -> None:
        self._max_s = self._left_s = max_s
        self._share = share
        self._since = time.monotonic()

    def left_s(self) -> float:
        """Return the remaining time, seconds."""
        now = time.monotonic()
        self._left_s = min(self._left_s + self._share * (now - self._since), self._max_s)
        self._since = now
        return max(self._left_s, 0.0)

    def spend(self, seconds: float) -> None:
        """Subtract time that a step has waited."""
        self._left_s -= seconds


class Pending:
    """Work of a worker, with its answers.

    Attributes:
        work: the work.
        state: state of the output after its tokens; None = not answered yet.
        done: state, with the mask if one is needed; None = not answered yet.
    """

    __slots__ = ("done", "state", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.state: Done | None = None
        self.done: Done | None = None


class GrammarProcess:
    """Worker of one grammar, shared by all outputs of the grammar and used by one thread.

    Work is collected, and sent in one message when the worker is idle.

    Args:
        connection: connection to the worker, which ends when the connection is closed.
        pid: process id of the worker.

    Attributes:
        pid: as given.
        patience: budget of the time for which steps wait for the worker.
        has_ended: True if the worker has reached its limits, or was killed.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection, self.pid = connection, pid
        # faster than `Connection.poll`, which makes a poll object for each call
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)
        self._waiting: list[Pending] = []
        # sent work whose states are missing, and work whose masks are missing
        self._sent: list[Pending] = []
        self._masked: list[Pending] = []
        self._dropped: deque[int] = deque()
        self._nice = float(os.getpriority(os.PRIO_PROCESS, 0))
        # processor time of the worker at which its niceness begins to grow, seconds
        self._slow_from_s = 0.0
        self._next_output = itertools.count()
        self.has_ended = False
        self.patience = Patience(_PATIENCE_S, _PATIENCE_SHARE)

    @property
    def is_busy(self) -> bool:
        """True while answers are missing. Answers that have come are read first."""
        while self._is_working and self._read(0.0):
            pass
        return self._is_working

    @property
    def _is_working(self) -> bool:
        """True while answers are missing or unread."""
        return bool(self._sent or self._masked)

    def copy(self, source: int = -1) -> int:
        """Add an output at the position of another one, and return its number.

        Args:
            source: number of the other output; -1 = the beginning of the grammar.
        """
        output = next(self._next_output)
        self.ask(Work(output, source))
        return output

    def drop(self, output: int) -> None:
        """Drop an output with the next work. Thread-safe."""
        self._dropped.append(output)

    def ask(self, work: Work) -> Pending:
        """Add work, which the next `send` or `answer` sends to the worker."""
        while self._dropped:
            self._waiting.append(Pending(Work(self._dropped.popleft(), is_over=True)))
        pending = Pending(work)
        self._waiting.append(pending)
        return pending

    def send(self) -> None:
        """Send the collected work to an idle worker."""
        if self.has_ended:
            self._end()
        if not self._waiting or self._is_working:
            return
        self._sent, self._waiting = self._waiting, []
        self._slow_from_s = processor_time(self.pid) + _USUAL_S * len(self._sent)
        try:
            self._connection.send([pending.work for pending in self._sent])
        except OSError:
            self._end()

    def answer(self, pending: Pending, needs_mask: bool, timeout_s: float | None) -> Done | None:
        """Return an answer, or None if it does not come in time.

        Args:
            pending: work of the worker.
            needs_mask: False if the state of the output is enough.
            timeout_s: maximum time to wait, seconds; None = without a bound.
        """
        self.send()
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while (done := pending.done if needs_mask else pending.state) is None:
            left_s = None if end_s is None else max(end_s - time.monotonic(), 0.0)
            if not self._read(left_s) and left_s == 0.0:
                break
        return done

    def give_way(self) -> None:
        """Raise the niceness of a worker whose late answer has taken much processor time.

        A worker that is late because it waits for a processor keeps its niceness.
        """
        now_s, before = processor_time(self.pid), int(self._nice)
        self._nice += max(now_s - self._slow_from_s, 0.0) / _NICE_EVERY_S
        self._slow_from_s = max(now_s, self._slow_from_s)
        if int(self._nice) > before:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.pid, min(int(self._nice), _MAX_NICE))

    def _read(self, timeout_s: float | None) -> bool:
        """Read the next answer, and return True if it has come in time."""
        if not self._poll.poll(None if timeout_s is None else timeout_s * 1e3):
            return False
        try:
            answers: list[Done] = self._connection.recv()
        except (EOFError, OSError):
            self._end()
            return True
        if self._sent:
            for pending, state in zip(self._sent, answers, strict=True):
                pending.state = state
                pending.done = None if pending.work.needs_mask else state
            self._masked = [pending for pending in self._sent if pending.work.needs_mask]
            self._sent = []
        else:
            for pending, done in zip(self._masked, answers, strict=True):
                pending.done = done
            self._masked = []
        self.send()
        return True

    def _end(self) -> None:
        """Answer all work with the reason for the end of the worker."""
        self.has_ended = True
        for pending in (*self._sent, *self._masked, *self._waiting):
            counts = (0,) * len(pending.work.counted)
            pending.state = pending.done = Done(error=_TOO_COMPLEX, counts=counts)
        self._sent, self._masked, self._waiting = [], [], []


def processor_time(pid: int) -> float:
    """Return the processor time of a process in seconds, 0 if it has ended."""
    try:
        # number of another process's clock, see clock_getcpuclockid(3)
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def wait_for_any(processes: Sequence[GrammarProcess], timeout_s: float | None) -> None:
    """Wait until any of some busy workers has answered or ended."""
    wait([process._connection for process in processes], timeout_s)
