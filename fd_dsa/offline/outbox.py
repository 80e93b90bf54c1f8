"""Outputs of unfinished requests, and the threads that step their engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

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
                with self.lock:
                    engine.add_request(request_id, token_ids, params)
                    self._by_request[request_id] = queue
            yield
        finally:
            for request_id in given:
                with self.lock:
                    if self._by_request.pop(request_id, None) is not None:
                        engine.abort_request(request_id)

    def step(self, engine: LLMEngine, queue: deque[RequestOutput]) -> None:
        """Step the engine, unless another thread's step filled the queue meanwhile."""
        # a thread that has stepped waits here, so that the next one gets the lock
        with self._next:
            self.lock.acquire()
        try:
            if not queue:
                for new in engine.step():
                    self._by_request[new.request_id].append(new)
        finally:
            self.lock.release()

    def clear(self) -> None:
        """Forget all requests."""
        self._by_request.clear()
