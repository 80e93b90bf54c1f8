"""Outputs of unfinished requests, and the threads that step their engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams


class Outbox:
    """Queues of an engine's outputs, one for each call. Calls of several threads share the steps.

    Attributes:
        lock: held by the thread that uses the engine. Its owner may take it again, because the
            garbage collector may close a stream inside a step.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._next = threading.Lock()
        self._by_request: dict[str, deque[RequestOutput]] = {}
        # both under the lock: True inside calls of the engine, and requests that ended meanwhile
        self._is_used = False
        self._ended: list[str] = []

    @contextmanager
    def requests(
        self,
        engine: LLMEngine,
        queue: deque[RequestOutput],
        given: dict[str, tuple[list[int], SamplingParams]],
    ) -> Iterator[None]:
        """Run requests inside, whose outputs come into `queue`. The end aborts unfinished ones.

        Args:
            given: token ids and parameters by request id.
        """
        try:
            for request_id, (token_ids, params) in given.items():
                with self._turn(engine):
                    engine.add_request(request_id, token_ids, params)
                    self._by_request[request_id] = queue
            yield
        finally:
            with self.lock:
                self._ended += [name for name in given if self._by_request.pop(name, None) is queue]
                if not self._is_used:
                    self._abort_ended(engine)

    def step(self, engine: LLMEngine, queue: deque[RequestOutput]) -> None:
        """Step the engine, unless another thread's step filled the queue meanwhile.

        Raises:
            RuntimeError: another thread has ended the requests of this call.
        """
        with self._turn(engine):
            if not queue:
                self._step(engine, queue)

    @contextmanager
    def _turn(self, engine: LLMEngine) -> Iterator[None]:
        """Use the engine inside. A thread that has used it waits until the next one does.

        A stream that the garbage collector closes inside is aborted at the end.
        """
        try:
            with self._next:
                self.lock.acquire()
            try:
                self._is_used = True
                yield
            finally:
                self._abort_ended(engine)
        finally:
            # an interrupt may come before or after the lock is acquired
            with suppress(RuntimeError):
                self.lock.release()

    def _abort_ended(self, engine: LLMEngine) -> None:
        """Abort the requests whose calls have ended."""
        self._is_used = True
        try:
            while self._ended:
                engine.abort_request(self._ended.pop())
        finally:
            self._is_used = False

    def _step(self, engine: LLMEngine, queue: deque[RequestOutput]) -> None:
        """Step the engine, and sort the outputs into the queues."""
        if not any(one is queue for one in self._by_request.values()):
            raise RuntimeError(
                "an interrupt or close() in another thread ended the requests of this call"
            )
        try:
            for new in engine.step():
                # its stream may have been closed in the step
                if (its_queue := self._by_request.get(new.request_id)) is not None:
                    its_queue.append(new)
        except Exception:
            # a later call of `engine.step` runs the step again
            raise
        except BaseException:
            # the outputs of the step are lost, and calls of other threads would wait for them
            self.clear()
            engine.abort_all()
            raise

    def clear(self) -> None:
        """Forget all requests."""
        self._by_request.clear()
