"""Loop that runs an engine: it takes commands between steps, and emits events.

An `AsyncEngine` sends the commands and receives the events. Both may cross a process boundary
(`fd_dsa.serve.engine_process`), so they are plain values.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.output import Additions, RequestOutput
from fd_dsa.engine.sampling_params import RequestLimits, SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import BusyError, RankError

COMMANDS_S = 0.02
"""Maximum time between two steps for commands, while requests run, seconds."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Command that queues a request.

    Attributes:
        key: unique id of the request in the engine.
        prompt_token_ids: tokens of the prompt, which the engine checks.
        params: sampling parameters.
    """

    key: str
    prompt_token_ids: np.ndarray
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Command that aborts a request, or a `UtilityCall` that has not begun.

    Attributes:
        key: id of the request or call.
        index: index of one output to end as if the model had ended it; None = abort all outputs.
    """

    key: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class UtilityCall:
    """Command that asks for a `UtilityResult` with the same key.

    Attributes:
        key: id of the call.
        name: name of a function of the `EngineLoop`.
        argument: argument of the function.
    """

    key: str
    name: str
    argument: Any = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Command that aborts all requests, then ends the loop."""


@dataclass(frozen=True, slots=True)
class UtilityResult:
    """Event with the result of a `UtilityCall`, or with the error of a call or an `AddRequest`."""

    key: str
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class EngineDead:
    """Last event of an engine that has failed. It serves no more requests."""

    error: BaseException


MAX_WAITING_CALLS = 64
"""Maximum number of waiting calls. The compilation of a grammar takes up to half a second."""
Command = AddRequest | AbortRequest | UtilityCall | Shutdown
Event = list[Additions] | UtilityResult | EngineDead
"""Additions of a step to outputs, the result of a command, or the failure of the engine."""

SNAPSHOT = "snapshot"
"""Call that returns the present `EngineStats` and `EngineMetrics` without waiting for a step."""
CHECK_FORM = "check_form"
"""Call that compiles the form of an output, or raises ValueError."""


@dataclass(frozen=True)
class EngineProperties:
    """Static information about an engine for its server.

    Attributes:
        limits: limits of its requests.
        sampling_defaults: fields of SamplingParams that the model proposes.
        captured_sizes: numbers of rows of the decode steps that are replayed from graphs.
    """

    limits: RequestLimits
    sampling_defaults: dict[str, Any]
    captured_sizes: tuple[int, ...]

    @classmethod
    def of(cls, engine: LLMEngine) -> EngineProperties:
        """Return the properties of an engine."""
        return cls(engine.limits, engine.sampling_defaults, engine.runner.info.captured_sizes)


class EngineClient:
    """Access of an `AsyncEngine` to its engine, which runs in a thread or in another process.

    Attributes:
        properties: static information about the engine.
        tokenizer: tokenizer of the engine.
        pid: process id of the engine; None = this process.
    """

    properties: EngineProperties
    tokenizer: Tokenizer
    pid: int | None = None
    _thread: threading.Thread | None = None

    @property
    def silent_s(self) -> float:
        """Age of the oldest message to the engine without an answer, seconds."""
        return 0.0

    @property
    def is_alive(self) -> bool:
        """True from `start` until the loop has ended."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, receive: Callable[[Event], None]) -> None:
        """Start the thread of the client, which calls `receive` with each event.

        Raises:
            RuntimeError: it was started before.
        """
        raise NotImplementedError

    def post(self, command: Command) -> None:
        """Send a command without waiting for the engine. Thread-safe."""
        raise NotImplementedError

    def join(self, timeout_s: float) -> None:
        """Wait until the loop has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def start_thread(self, target: Callable[[], object]) -> None:
        """Run `target` in the thread of the client.

        Raises:
            RuntimeError: it was started before.
        """
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        self._thread = threading.Thread(target=target, name="fd_dsa-engine", daemon=True)
        self._thread.start()


class EngineLoop:
    """Runs one engine in the thread that calls `run`.

    Args:
        engine: engine that only this loop uses.
        emit: called with each event, by several threads at the same time.
        functions: functions of further utility calls by name, in addition to `SNAPSHOT` and
            `CHECK_FORM`. They run in a separate thread.
    """

    def __init__(
        self,
        engine: LLMEngine,
        emit: Callable[[Event], None],
        functions: Mapping[str, Callable[[Any], object]] | None = None,
    ) -> None:
        self._engine = engine
        self._emit = emit
        self._functions = {CHECK_FORM: engine.grammars.check, **(functions or {})}
        # one thread, because work alongside the steps may use one processor
        self._utility_executor = ThreadPoolExecutor(1, thread_name_prefix="fd_dsa-utility")
        # calls that wait for that thread or run in it, by key
        self._calls: dict[str, Future[None]] = {}
        self._wake = threading.Condition()
        # other threads append while they hold _wake; only this thread removes
        self._commands: deque[AddRequest | AbortRequest] = deque()
        self._is_stopping = False
        self._failure: BaseException | None = None

    def post(self, command: Command | EngineDead) -> None:
        """Enqueue a command, or the failure of another process of the engine. Thread-safe."""
        if isinstance(command, UtilityCall):
            if command.name == SNAPSHOT:
                snapshot = (self._engine.stats(), self._engine.metrics)
                self._emit(UtilityResult(command.key, snapshot))
            elif not self._is_stopping:
                self._submit(command)
            return
        if isinstance(command, AbortRequest) and (call := self._calls.get(command.key)) is not None:
            call.cancel()
            return
        with self._wake:
            if isinstance(command, Shutdown):
                self._is_stopping = True
            elif isinstance(command, EngineDead):
                self._failure = command.error
            else:
                self._commands.append(command)
            self._wake.notify()

    def _submit(self, command: UtilityCall) -> None:
        """Enqueue a utility call, or refuse it if too many are waiting."""
        if len(self._calls) >= MAX_WAITING_CALLS:
            error = BusyError(f"{len(self._calls)} grammars wait to be compiled; try again later")
            self._emit(UtilityResult(command.key, error=error))
            return
        call = self._utility_executor.submit(self._call, command)
        self._calls[command.key] = call
        call.add_done_callback(lambda _: self._calls.pop(command.key, None))

    def run(self) -> bool:
        """Serve until `Shutdown` or a failure of the engine.

        Returns:
            False after a failure.
        """
        try:
            while self._take_commands():
                if self._engine.has_unfinished_requests():
                    self._deliver(self._engine.step())
            self._deliver(self._engine.abort_all())
        except BaseException as error:
            # for a rank that has ended, our own traceback is not informative
            trace = None if isinstance(error, RankError) else error
            logger.error("the engine has failed: %s", error, exc_info=trace)
            self._emit(EngineDead(error))
            return False
        finally:
            self._utility_executor.shutdown(wait=False, cancel_futures=True)
        return True

    def _take_commands(self) -> bool:
        """Wait for work, and run the queued commands.

        Returns:
            False if the loop must end.
        """
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
        # bound the time, because hundreds of new requests would delay the tokens of running ones
        until = time.monotonic() + COMMANDS_S
        while self._commands:
            self._run_command(self._commands.popleft())
            is_late = time.monotonic() > until and self._engine.has_unfinished_requests()
            if is_late and not is_stopping:
                break
        return not is_stopping

    def _run_command(self, command: AddRequest | AbortRequest) -> None:
        """Apply a command to the engine."""
        if isinstance(command, AddRequest):
            prompt_token_ids, params = command.prompt_token_ids, command.params
            try:
                self._engine.add_request(command.key, prompt_token_ids, params)
            except ValueError as error:
                self._emit(UtilityResult(command.key, error=error))
        elif command.index is None:
            self._deliver(self._engine.abort_request(command.key))
        else:
            self._deliver(self._engine.finish_output(command.key, command.index))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Emit the additions of a step to outputs."""
        if outputs:
            self._emit([output.additions() for output in outputs])

    def _call(self, command: UtilityCall) -> None:
        """Run a utility call, and emit its result."""
        try:
            value = self._functions[command.name](command.argument)
        except Exception as error:
            self._emit(UtilityResult(command.key, error=error))
        else:
            self._emit(UtilityResult(command.key, value))
