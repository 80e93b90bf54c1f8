"""The loop that runs an engine: commands in, events out, one step after another.

An `AsyncEngine` sends the commands and receives the events. Both may cross a process boundary
(`fd_dsa.serve.engine_process`), so they are plain values.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.limits import RequestLimits
from fd_dsa.engine.output import Added, RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import BusyError, RankError

COMMANDS_S = 0.02
"""Seconds between two steps in which an engine with running requests takes commands."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Add:
    """Command: queue a request. `key` is its id in the engine; no two requests have the same."""

    key: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class End:
    """Command: abort a request, or an `Ask` that has not begun.

    With an index, end that one of a request's outputs as if the model had.
    """

    key: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Command: answer a question with a `Reply` of the same key; `EngineHost` has the questions."""

    key: str
    question: str
    argument: Any = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Command: abort everything, then end the loop."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Event: the answer to an `Ask`, or the error with which it or an `Add` was refused."""

    key: str
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Event, the last one: the engine has failed and serves no more requests."""

    error: BaseException


MAX_ASKED = 64
"""Questions that wait for their thread; a grammar takes up to half a second of it."""
Command = Add | End | Ask | Stop
Event = list[Added] | Reply | Failed
"""What a step has added to outputs, the reply to a command, or the end."""

SNAPSHOT = "snapshot"
"""Question: `EngineStats` and `EngineMetrics` as they are now; does not wait for a step."""
CHECK_FORM = "check_form"
"""Question: None where the form of an output can be compiled, else a ValueError."""


@dataclass(frozen=True)
class EngineFacts:
    """What a server must know of its engine.

    Attributes:
        limits: what the engine can ever run.
        sampling_defaults: fields of SamplingParams that the model proposes.
        captured_sizes: rows of the decode steps that are replayed from graphs.
    """

    limits: RequestLimits
    sampling_defaults: dict[str, Any]
    captured_sizes: tuple[int, ...]

    @classmethod
    def of(cls, engine: LLMEngine) -> EngineFacts:
        """The facts of an engine."""
        return cls(engine.limits, engine.sampling_defaults, engine.runner.info.captured_sizes)


class EngineLink:
    """Where an `AsyncEngine` finds its engine: a thread of this process runs it, or reads from it.

    Attributes:
        facts: of the engine.
        tokenizer: of the engine.
        pid: number of the engine's process; None where it is this one.
    """

    facts: EngineFacts
    tokenizer: Tokenizer
    pid: int | None = None
    _thread: threading.Thread | None = None

    @property
    def silent_s(self) -> float:
        """Seconds since a message was sent to the engine that nothing has come back after."""
        return 0.0

    @property
    def is_alive(self) -> bool:
        """True from `start` until the loop has ended."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, receive: Callable[[Event], None]) -> None:
        """Begin to run; `receive` is called in a thread of the link.

        Raises:
            RuntimeError: it was started before.
        """
        raise NotImplementedError

    def post(self, command: Command) -> None:
        """Send a command; from any thread, without waiting for the engine."""
        raise NotImplementedError

    def join(self, timeout_s: float) -> None:
        """Wait until the loop has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def start_thread(self, target: Callable[[], object]) -> None:
        """Run `target` in the thread of the link.

        Raises:
            RuntimeError: it was started before.
        """
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        self._thread = threading.Thread(target=target, name="fd_dsa-engine", daemon=True)
        self._thread.start()


class EngineHost:
    """Runs one engine in the thread that calls `run`.

    Args:
        engine: used by no one else.
        emit: takes the events; called in several threads, perhaps at the same time.
        answers: questions beside `SNAPSHOT` and `CHECK_FORM`, with the functions that answer them
            from the argument; called in a thread of their own.
    """

    def __init__(
        self,
        engine: LLMEngine,
        emit: Callable[[Event], None],
        answers: Mapping[str, Callable[[Any], object]] | None = None,
    ) -> None:
        self._engine = engine
        self._emit = emit
        self._answers = {CHECK_FORM: engine.grammars.check, **(answers or {})}
        # one: what is computed beside the steps takes one processor
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="fd_dsa-aside")
        # questions that wait for that thread or are in it, by their keys
        self._asked: dict[str, Future[None]] = {}
        self._wake = threading.Condition()
        # other threads append with _wake held; only this thread takes
        self._commands: deque[Add | End] = deque()
        self._is_stopping = False
        self._failure: BaseException | None = None

    def post(self, command: Command | Failed) -> None:
        """Take a command, or what has happened to a process of the engine; from any thread."""
        if isinstance(command, Ask):
            if command.question == SNAPSHOT:
                snapshot = (self._engine.stats(), self._engine.metrics)
                self._emit(Reply(command.key, snapshot))
            elif not self._is_stopping:
                self._ask(command)
            return
        if isinstance(command, End) and (asked := self._asked.get(command.key)) is not None:
            asked.cancel()
            return
        with self._wake:
            if isinstance(command, Stop):
                self._is_stopping = True
            elif isinstance(command, Failed):
                self._failure = command.error
            else:
                self._commands.append(command)
            self._wake.notify()

    def _ask(self, command: Ask) -> None:
        """Have a question answered in its thread, after those that came before."""
        if len(self._asked) >= MAX_ASKED:
            error = BusyError(f"{len(self._asked)} grammars wait to be compiled; try again later")
            self._emit(Reply(command.key, error=error))
            return
        asked = self._aside.submit(self._answer, command)
        self._asked[command.key] = asked
        asked.add_done_callback(lambda _: self._asked.pop(command.key, None))

    def run(self) -> bool:
        """Serve until `Stop` or a failure of the engine; False after a failure."""
        try:
            while self._take_commands():
                if self._engine.has_unfinished_requests():
                    self._deliver(self._engine.step())
            self._deliver(self._engine.abort_all())
        except BaseException as error:
            # of a rank that has ended the place says nothing
            trace = None if isinstance(error, RankError) else error
            logger.error("the engine has failed: %s", error, exc_info=trace)
            self._emit(Failed(error))
            return False
        finally:
            self._aside.shutdown(wait=False, cancel_futures=True)
        return True

    def _take_commands(self) -> bool:
        """Wait for work and run what is queued; False when the loop is to end."""
        with self._wake:
            while not (
                self._commands
                or self._is_stopping
                or self._failure is not None
                or self._engine.has_unfinished_requests()
            ):
                self._wake.wait()
            if self._failure is not None and not self._is_stopping:
                raise self._failure
            is_stopping = self._is_stopping
        # hundreds of requests that arrive together would hold up the tokens of running ones
        until = time.monotonic() + COMMANDS_S
        while self._commands:
            self._run_command(self._commands.popleft())
            is_late = time.monotonic() > until and self._engine.has_unfinished_requests()
            if is_late and not is_stopping:
                break
        return not is_stopping

    def _run_command(self, command: Add | End) -> None:
        """Change the engine as a command says."""
        if isinstance(command, Add):
            prompt_token_ids, params = command.prompt_token_ids, command.params
            try:
                self._engine.add_request(command.key, prompt_token_ids, params)
            except ValueError as error:
                self._emit(Reply(command.key, error=error))
        elif command.index is None:
            self._deliver(self._engine.abort_request(command.key))
        else:
            self._deliver(self._engine.finish_output(command.key, command.index))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Emit what outputs have gained."""
        if outputs:
            self._emit([output.added() for output in outputs])

    def _answer(self, command: Ask) -> None:
        """Emit the reply to a question."""
        try:
            value = self._answers[command.question](command.argument)
        except Exception as error:
            self._emit(Reply(command.key, error=error))
        else:
            self._emit(Reply(command.key, value))
