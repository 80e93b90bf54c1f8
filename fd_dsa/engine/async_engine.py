"""The engine in its own thread, for callers in asyncio."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.stats import EngineStats
from fd_dsa.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 30.0


class AsyncEngine:
    """Runs an engine in a thread and hands its outputs to asyncio tasks.

    The engine belongs to the thread from `start` on. Calls become commands which the thread
    takes between two steps; outputs go back once a step and event loop. When a step fails,
    `errored` is set and every iterator ends with the error; nothing waits for ever.

    Args:
        engine: not used by anyone else.
    """

    def __init__(self, engine: LLMEngine) -> None:
        """Keep the engine; `start` starts the thread."""
        self.errored: BaseException | None = None
        self.tokenizer: Tokenizer = engine.tokenizer
        self.max_model_len = engine.max_model_len
        self.sampling_defaults = engine.sampling_defaults
        self.metrics = engine.metrics
        self.captured_sizes = engine.captured_sizes
        self._engine = engine
        self._thread = threading.Thread(target=self._run, name="fd_dsa-engine", daemon=True)
        self._wake = threading.Condition()
        # guarded by _wake
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[str, _Stream] = {}
        self._is_stopping = False
        self._ids = itertools.count()

    @property
    def is_running(self) -> bool:
        """True while the thread serves."""
        return self._thread.is_alive() and self.errored is None and not self._is_stopping

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: it was started before.
        """
        self._thread.start()

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Output tokens that a request may have.

        Raises:
            ValueError: the request can never run; see `LLMEngine.validate`.
        """
        return self._engine.validate(prompt_token_ids, params)

    def stats(self) -> EngineStats:
        """Counters and load; a figure may be one step old."""
        return self._engine.stats()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as they come; of n indices each ends with one that is `finished`.

        Closing or cancelling the iterator aborts the request before the next step. A request
        that fails alone ends with finish_reason "error".

        Args:
            prompt_token_ids: the prompt.
            params: how to sample and when to end.
            request_id: unique among unfinished requests; None = made here.

        Raises:
            ValueError: the request can never run, or its id is in use.
            RuntimeError: the engine is not running or has failed.
        """
        name = f"request-{next(self._ids)}" if request_id is None else request_id
        stream = _Stream(name, params.n)
        self._open(stream, prompt_token_ids, params)
        try:
            while not stream.is_finished:
                yield await stream.get()
        finally:
            self._close(stream)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; what is unfinished of it gets an output "abort"."""
        with self._wake:
            self._push(lambda: self._abort(request_id))

    def finish_output(self, request_id: str, index: int) -> None:
        """End one of a request's n outputs before the next step, as if the model had ("stop")."""
        with self._wake:
            self._push(lambda: self._deliver(self._engine.finish_output(request_id, index)))

    def stop(self) -> None:
        """End all requests with finish_reason "abort", then the thread. May be called twice.

        Blocks until the step in progress is over.
        """
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(_JOIN_TIMEOUT_S)

    def _open(
        self, stream: _Stream, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Register a stream and queue its request."""
        with self._wake:
            if self.errored is not None:
                raise _failure(self.errored)
            if self._is_stopping:
                raise RuntimeError("the engine is shutting down and takes no new requests")
            if not self._thread.is_alive():
                raise RuntimeError("the engine is not running; call start() first")
            if stream.request_id in self._streams:
                raise ValueError(f"request_id {stream.request_id!r} is in use; choose another one")
            self._streams[stream.request_id] = stream
            self._push(lambda: self._add(stream, prompt_token_ids, params))

    def _close(self, stream: _Stream) -> None:
        """Forget a stream; abort its request if it still runs."""
        with self._wake:
            if self._streams.get(stream.request_id) is stream:
                del self._streams[stream.request_id]
                self._push(lambda: self._discard(stream.request_id))

    def _push(self, command: Callable[[], None]) -> None:
        """Queue a command for the thread; the caller holds the lock."""
        self._commands.append(command)
        self._wake.notify()

    def _run(self) -> None:
        """Body of the thread."""
        try:
            while self._take_commands():
                if self._engine.has_unfinished_requests():
                    self._deliver(self._engine.step())
            self._abort_all()
        except BaseException as error:
            logger.error("the engine has failed", exc_info=error)
            self._fail(error)

    def _take_commands(self) -> bool:
        """Wait for work and run what is queued; False when the thread is to end."""
        with self._wake:
            while not (
                self._commands or self._is_stopping or self._engine.has_unfinished_requests()
            ):
                self._wake.wait()
            commands = list(self._commands)
            self._commands.clear()
            is_stopping = self._is_stopping
        for command in commands:
            command()
        return not is_stopping

    def _add(
        self, stream: _Stream, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Command: hand a request to the engine."""
        try:
            self._engine.add_request(stream.request_id, prompt_token_ids, params)
            stream.is_added = True
        except ValueError as error:
            self._put([(stream, error)])

    def _abort(self, request_id: str) -> None:
        """Command: end a request and tell its stream."""
        self._deliver(self._engine.abort_request(request_id))

    def _discard(self, request_id: str) -> None:
        """Command: end a request that nobody listens to."""
        self._engine.abort_request(request_id)

    def _abort_all(self) -> None:
        """End everything that still runs."""
        with self._wake:
            request_ids = list(self._streams)
        for request_id in request_ids:
            self._abort(request_id)

    def _fail(self, error: BaseException) -> None:
        """Set `errored` and end every stream with it."""
        with self._wake:
            self.errored = error
            streams = list(self._streams.values())
        self._put([(stream, _failure(error)) for stream in streams])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Give outputs to their streams; ended streams are forgotten."""
        items: list[tuple[_Stream, _Item]] = []
        with self._wake:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                # an id may be used again before the output of its first owner gets here
                if stream is None or not stream.is_added:
                    continue
                items.append((stream, output))
                stream.num_undelivered -= output.finished
                if not stream.num_undelivered:
                    del self._streams[output.request_id]
        self._put(items)

    def _put(self, items: list[tuple[_Stream, _Item]]) -> None:
        """Send items to the event loops of their streams, one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _Item]]] = {}
        for item in items:
            by_loop.setdefault(item[0].loop, []).append(item)
        for loop, group in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, group)
            except RuntimeError:
                # the loop is closed, so nobody listens any more
                for stream, _ in group:
                    self._close(stream)


_Item = RequestOutput | Exception


class _Stream:
    """Outputs of one request on their way to one task."""

    def __init__(self, request_id: str, num_outputs: int) -> None:
        """Belongs to the running event loop."""
        self.request_id = request_id
        # outputs whose end the thread has not sent, and the task has not read
        self.num_undelivered = num_outputs
        self._num_unread = num_outputs
        self.loop = asyncio.get_running_loop()
        self.is_added = False
        self.is_finished = False
        self._items: deque[_Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: _Item) -> None:
        """Add an item; called in the loop."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> RequestOutput:
        """Next output; raises what was put in its place."""
        while not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, Exception):
            self.is_finished = True
            raise item
        self._num_unread -= item.finished
        self.is_finished = not self._num_unread
        return item


def _put_all(items: list[tuple[_Stream, _Item]]) -> None:
    """Put items into their streams; runs in the event loop."""
    for stream, item in items:
        stream.put(item)


def _failure(error: BaseException) -> RuntimeError:
    """What a caller gets after the engine has failed."""
    failure = RuntimeError(
        f"the engine has failed and serves no more requests: {type(error).__name__}: {error}"
    )
    failure.__cause__ = error
    return failure
