"""The engine for callers in asyncio; its steps run in a thread."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fd_dsa.engine.host import (
    CHECK_FORM,
    SNAPSHOT,
    Add,
    Ask,
    End,
    EngineLink,
    Event,
    Reply,
    Stop,
)
from fd_dsa.engine.metrics import EngineMetrics, EngineStats
from fd_dsa.engine.output import Added, OutputState, RequestOutput, take_added
from fd_dsa.engine.sampling_params import SamplingParams

_JOIN_TIMEOUT_S = 30.0


class AsyncEngine:
    """Sends requests to an engine and hands its outputs to asyncio tasks.

    Calls become commands, which the engine takes between two steps; what a step has added comes
    back once a step and event loop. When a step fails, or the engine's process ends, `errored` is
    set and every iterator ends with the error; nothing waits indefinitely.

    Args:
        link: to an engine, which may be in another process.

    Attributes:
        errored: why the engine serves no more requests; None while it does.
        facts: sizes and defaults of the engine.
        tokenizer: of the model.
        pid: of the process that the engine has to itself; None in this one.
    """

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self.errored: BaseException | None = None
        self.facts = self._link.facts
        self.tokenizer = self._link.tokenizer
        self.max_model_len = self.facts.limits.max_model_len
        self.sampling_defaults = self.facts.sampling_defaults
        self.captured_sizes = self.facts.captured_sizes
        self.pid = self._link.pid
        self._numbers = itertools.count()
        self._is_started = False
        # orders commands, so that one for a request never overtakes the request
        self._lock = threading.Lock()
        # guarded by _lock; streams by the key of their request, keys by the caller's name for it
        self._streams: dict[str, _Stream] = {}
        self._keys: dict[str, str] = {}
        self._replies: dict[str, Future[Any]] = {}
        self._is_stopping = False

    @property
    def is_running(self) -> bool:
        """True while the engine serves."""
        return self._link.is_alive and self.errored is None and not self._is_stopping

    @property
    def silent_s(self) -> float:
        """Seconds for which the engine's process has not answered; 0 while it does."""
        return self._link.silent_s

    def start(self) -> None:
        """Let the engine run.

        Raises:
            RuntimeError: it was started before.
        """
        self._link.start(self._receive)
        self._is_started = True

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Output tokens that a request may have; its form is checked by `check_form`.

        Raises:
            ValueError: the request can never run; see `RequestLimits.validate`.
        """
        return self.facts.limits.validate(prompt_token_ids, params)

    async def check_form(self, params: SamplingParams) -> None:
        """Let the engine compile the form of an output, which the parameters have.

        Raises:
            ValueError: it cannot be compiled; begins with the name of the field.
            RuntimeError: the engine is not running or has failed.
        """
        await self.ask(CHECK_FORM, params)

    async def snapshot(self) -> tuple[EngineStats, EngineMetrics]:
        """Load and counters; a figure may be one step old.

        Raises:
            RuntimeError: the engine is not running or has failed.
        """
        stats, metrics = await self.ask(SNAPSHOT)
        return stats, metrics

    async def ask(self, question: str, argument: object = None) -> Any:
        """The engine's answer to a question of its host.

        A caller that is cancelled takes the question back, unless its answer is being made.

        Raises:
            RuntimeError: the engine is not running or has failed; as `BusyError`, too many
                questions wait for it.
            Exception: what the question says.
        """
        key, reply = str(next(self._numbers)), Future[Any]()
        # so that only the one who waits can be cancelled, not the reply
        reply.set_running_or_notify_cancel()
        with self._lock:
            self._check_running()
            self._replies[key] = reply
        self._link.post(Ask(key, question, argument))
        try:
            return await asyncio.wrap_future(reply)
        finally:
            with self._lock:
                is_left = self._replies.pop(key, None) is not None
            if is_left:
                self._link.post(End(key))

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
            prompt_token_ids: the prompt, which `validate` has taken.
            params: how to sample and when to end.
            request_id: unique among unfinished requests; None = made here.

        Raises:
            ValueError: the request can never run, or its id is in use.
            RuntimeError: the engine is not running or has failed.
        """
        key = str(next(self._numbers))
        name = f"request-{key}" if request_id is None else request_id
        prompt = list(prompt_token_ids)
        stream = _Stream(key, [OutputState(name, index, prompt) for index in range(params.n)])
        if params.logprobs is not None:
            for state in stream.states:
                state.logprobs = []
        with self._lock:
            self._check_running()
            if name in self._keys:
                raise ValueError(f"request_id {name!r} is in use; choose another one")
            self._streams[key] = stream
            self._keys[name] = key
            self._link.post(Add(key, prompt_token_ids, params))
        try:
            num_unread = params.n
            while num_unread:
                item = await stream.items.get()
                if isinstance(item, Exception):
                    raise item
                num_unread -= item.finished
                yield item
        finally:
            self._close(stream)

    def end(self, request_id: str, index: int | None = None) -> None:
        """End a request before the next step; what is unfinished of it gets an output "abort".

        With an index, end that one of its n outputs alone, as if the model had ("stop").
        """
        with self._lock:
            key = self._keys.get(request_id)
            if key is not None:
                self._link.post(End(key, index))

    def stop(self) -> None:
        """End all requests with finish_reason "abort", then the engine. May be called twice.

        Blocks until the step in progress is over.
        """
        with self._lock:
            self._is_stopping = True
        if self._link.is_alive:
            self._link.post(Stop())
            self._link.join(_JOIN_TIMEOUT_S)

    def _check_running(self) -> None:
        """RuntimeError unless the engine takes requests; the caller holds the lock."""
        if self.errored is not None:
            raise _failure(self.errored)
        if self._is_stopping:
            raise RuntimeError("the engine is shutting down and takes no new requests")
        if not self._is_started:
            raise RuntimeError("the engine is not running; call start() first")

    def _close(self, stream: _Stream) -> None:
        """Forget a stream; abort its request if it still runs."""
        with self._lock:
            if self._forget(stream):
                self._link.post(End(stream.key))

    def _forget(self, stream: _Stream) -> bool:
        """Drop a stream; False where it was dropped before. The caller holds the lock."""
        if self._streams.pop(stream.key, None) is None:
            return False
        del self._keys[stream.states[0].request_id]
        return True

    def _receive(self, event: Event) -> None:
        """Take an event; called in a thread of the link."""
        if isinstance(event, list):
            self._deliver(event)
        elif isinstance(event, Reply):
            with self._lock:
                reply = self._replies.pop(event.key, None)
                stream = self._streams.get(event.key)
                if stream is not None:
                    self._forget(stream)
            if stream is not None and event.error is not None:
                self._put([(stream, event.error)])
            elif reply is not None and event.error is not None:
                reply.set_exception(event.error)
            elif reply is not None:
                reply.set_result(event.value)
        else:
            self._fail(event.error)

    def _deliver(self, outputs: list[Added]) -> None:
        """Give their streams what a step has added; ended streams are forgotten."""
        items: list[tuple[_Stream, _Item]] = []
        with self._lock:
            for key, *added in outputs:
                stream = self._streams.get(key)
                if stream is None:
                    continue
                output = take_added(stream.states, *added)
                items.append((stream, output))
                if output.finished and all(one.finish_time is not None for one in stream.states):
                    self._forget(stream)
        self._put(items)

    def _fail(self, error: BaseException) -> None:
        """Set `errored` and end everything with it."""
        failure = _failure(error)
        with self._lock:
            self.errored = error
            streams, replies = list(self._streams.values()), list(self._replies.values())
            self._replies.clear()
        self._put([(stream, failure) for stream in streams])
        for reply in replies:
            reply.set_exception(failure)

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


@dataclass(eq=False)
class _Stream:
    """Outputs of one request on their way to one task of the running event loop.

    Attributes:
        key: id of the request in the engine.
        states: of each output, as far as the engine has sent it.
        items: what the task has not read.
    """

    key: str
    states: list[OutputState]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    items: asyncio.Queue[_Item] = field(default_factory=asyncio.Queue)


def _put_all(items: list[tuple[_Stream, _Item]]) -> None:
    """Put items into their streams; runs in the event loop."""
    for stream, item in items:
        stream.items.put_nowait(item)


def _failure(error: BaseException) -> RuntimeError:
    """What a caller gets after the engine has failed."""
    failure = RuntimeError(
        f"the engine has failed and serves no more requests: {type(error).__name__}: {error}"
    )
    failure.__cause__ = error
    return failure
