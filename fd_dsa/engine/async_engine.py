"""Engine for callers in asyncio, whose steps run in another thread or process."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fd_dsa.engine.loop import (
    CHECK_FORM,
    SNAPSHOT,
    AbortRequest,
    AddRequest,
    EngineClient,
    Event,
    Shutdown,
    UtilityCall,
    UtilityResult,
)
from fd_dsa.engine.metrics import EngineMetrics, EngineStats
from fd_dsa.engine.output import Additions, OutputState, RequestOutput, apply_additions
from fd_dsa.engine.sampling_params import SamplingParams

_JOIN_TIMEOUT_S = 30.0


class AsyncEngine:
    """Sends requests to an engine, and its outputs to asyncio tasks.

    Calls become commands, which the engine runs between two steps. The additions of a step come
    back in one call for each event loop. If a step fails or the engine's process ends, `errored` is
    set, and every iterator and call ends with the error.

    Args:
        client: access to an engine, which may be in another process.

    Attributes:
        errored: error that has ended the engine, or None.
        properties: sizes and defaults of the engine.
        tokenizer: tokenizer of the model.
        max_model_len, sampling_defaults, captured_sizes: fields of `properties`.
        pid: process id of the engine; None = this process.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self.errored: BaseException | None = None
        self.properties = self._client.properties
        self.tokenizer = self._client.tokenizer
        self.max_model_len = self.properties.limits.max_model_len
        self.sampling_defaults = self.properties.sampling_defaults
        self.captured_sizes = self.properties.captured_sizes
        self.pid = self._client.pid
        self._numbers = itertools.count()
        self._is_started = False
        # keeps the order of commands, so that an abort never overtakes its request
        self._lock = threading.Lock()
        # guarded by _lock: streams by the key of their request, keys by the caller's request id
        self._streams: dict[str, _Stream] = {}
        self._keys: dict[str, str] = {}
        self._replies: dict[str, Future[Any]] = {}
        self._is_stopping = False

    @property
    def is_running(self) -> bool:
        """True while the engine serves requests."""
        return self._client.is_alive and self.errored is None and not self._is_stopping

    @property
    def silent_s(self) -> float:
        """Time for which the engine's process has not answered, seconds. 0 while it answers."""
        return self._client.silent_s

    def start(self) -> None:
        """Start the engine.

        Raises:
            RuntimeError: it was started before.
        """
        self._client.start(self._receive)
        self._is_started = True

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Return the maximum number of output tokens of a request. `check_form` checks its form.

        Raises:
            ValueError: the request can never run; see `RequestLimits.validate`.
        """
        return self.properties.limits.validate(prompt_token_ids, params)[0]

    async def check_form(self, params: SamplingParams) -> None:
        """Compile the form of an output on the engine.

        Raises:
            ValueError: the form cannot be compiled. The message begins with the name of the field.
            RuntimeError: the engine is not running or has failed.
        """
        await self.ask(CHECK_FORM, params)

    async def snapshot(self) -> tuple[EngineStats, EngineMetrics]:
        """Return load and counters of the engine. A figure may be one step old.

        Raises:
            RuntimeError: the engine is not running or has failed.
        """
        stats, metrics = await self.ask(SNAPSHOT)
        return stats, metrics

    async def ask(self, name: str, argument: object = None) -> Any:
        """Return the result of a utility call of the engine.

        If the caller is cancelled, the call is cancelled too unless it has begun.

        Args:
            name: name of a function of the `EngineLoop`.
            argument: argument of the function.

        Raises:
            BusyError: too many calls are waiting.
            RuntimeError: the engine is not running or has failed.
            Exception: error of the function.
        """
        key, reply = str(next(self._numbers)), Future[Any]()
        # only the caller can be cancelled, not the future
        reply.set_running_or_notify_cancel()
        with self._lock:
            self._check_running()
            self._replies[key] = reply
        self._client.post(UtilityCall(key, name, argument))
        try:
            return await asyncio.wrap_future(reply)
        finally:
            # the traceback of its error has this frame
            del reply
            with self._lock:
                is_left = self._replies.pop(key, None) is not None
            if is_left:
                self._client.post(AbortRequest(key))

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of a request after each step, until each of the n has `finished`.

        Closing or cancelling the iterator aborts the request before the next step. If only this
        request fails, it ends with finish_reason "error".

        Args:
            prompt_token_ids: prompt that has passed `validate`.
            params: sampling parameters.
            request_id: id that is unique among unfinished requests; None = a new one.

        Raises:
            ValueError: the request can never run, or its id is in use.
            RuntimeError: the engine is not running or has failed.
        """
        key = str(next(self._numbers))
        name = f"request-{key}" if request_id is None else request_id
        # an array crosses the socket in a small part of the time of a list
        prompt, array = list(prompt_token_ids), np.asarray(prompt_token_ids)
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
            self._client.post(AddRequest(key, array, params))
        try:
            num_unread = params.n
            while num_unread:
                item = await stream.items.get()
                if isinstance(item, Exception):
                    try:
                        raise item
                    finally:
                        # its traceback has this frame
                        del item
                num_unread -= item.finished
                yield item
        finally:
            self._close(stream)

    def end(self, request_id: str, index: int | None = None) -> None:
        """End a request before the next step. Its unfinished outputs get the reason "abort".

        Args:
            request_id: id of the request.
            index: index of one output to end with the reason "stop"; None = all outputs.
        """
        with self._lock:
            key = self._keys.get(request_id)
            if key is not None:
                self._client.post(AbortRequest(key, index))

    def stop(self) -> None:
        """End all requests with finish_reason "abort", then the engine.

        The call waits for the end of the running step, and may be repeated.
        """
        with self._lock:
            self._is_stopping = True
        if self._client.is_alive:
            self._client.post(Shutdown())
            self._client.join(_JOIN_TIMEOUT_S)

    def _check_running(self) -> None:
        """Raise RuntimeError unless the engine takes requests. The caller holds the lock."""
        if self.errored is not None:
            raise _failure(self.errored)
        if self._is_stopping:
            raise RuntimeError("the engine is shutting down and takes no new requests")
        if not self._is_started:
            raise RuntimeError("the engine is not running; call start() first")

    def _close(self, stream: _Stream) -> None:
        """Drop a stream, and abort its request if it still runs."""
        with self._lock:
            if self._forget(stream):
                self._client.post(AbortRequest(stream.key))

    def _forget(self, stream: _Stream) -> bool:
        """Drop a stream. The caller holds the lock.

        Returns:
            False if the stream was dropped before.
        """
        if self._streams.pop(stream.key, None) is None:
            return False
        del self._keys[stream.states[0].request_id]
        return True

    def _receive(self, event: Event) -> None:
        """Handle an event, in a thread of the client."""
        if isinstance(event, list):
            self._deliver(event)
        elif isinstance(event, UtilityResult):
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

    def _deliver(self, outputs: list[Additions]) -> None:
        """Send the additions of a step to their streams, and drop streams that have ended."""
        items: list[tuple[_Stream, _Item]] = []
        with self._lock:
            for key, *additions in outputs:
                stream = self._streams.get(key)
                if stream is None:
                    continue
                output = apply_additions(stream.states, *additions)
                items.append((stream, output))
                if output.finished and all(one.finish_time is not None for one in stream.states):
                    self._forget(stream)
        self._put(items)

    def _fail(self, error: BaseException) -> None:
        """Set `errored`, and end all streams and calls with the error."""
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
                # the event loop is closed, so its tasks have ended
                for stream, _ in group:
                    self._close(stream)


_Item = RequestOutput | Exception


@dataclass(eq=False)
class _Stream:
    """Outputs of one request for one task of the running event loop.

    Attributes:
        key: id of the request in the engine.
        states: state of each output, as the engine has sent it so far.
        loop: event loop of the task.
        items: outputs that the task has not read.
    """

    key: str
    states: list[OutputState]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    items: asyncio.Queue[_Item] = field(default_factory=asyncio.Queue)


def _put_all(items: list[tuple[_Stream, _Item]]) -> None:
    """Put items into their streams, in the thread of the event loop."""
    for stream, item in items:
        stream.items.put_nowait(item)


def _failure(error: BaseException) -> RuntimeError:
    """Return the error of a caller after the engine has failed."""
    failure = RuntimeError(
        f"the engine has failed and serves no more requests: {type(error).__name__}: {error}"
    )
    failure.__cause__ = error
    return failure
