"""Engine whose steps calls of several threads share."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams


class SharedEngine:
    """Engine without a thread of its own, with a queue of outputs for each call.

    A step serves the requests of all calls, and any of their threads may run it.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine: LLMEngine | None = engine
        # Held by the thread that uses the engine. Its owner may take it again, because the garbage
        # collector may close a stream inside a step.
        self._lock = threading.RLock()
        self._next = threading.Lock()
        self._calls = itertools.count()
        self._by_request: dict[str, deque[RequestOutput]] = {}
        # both under the lock: True inside calls of the engine, and requests that ended meanwhile
        self._is_used = False
        self._ended: list[str] = []

    @property
    def engine(self) -> LLMEngine:
        """The engine.

        Raises:
            RuntimeError: `close` was called.
        """
        if self._engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._engine

    def stream(
        self,
        texts: list[str | None],
        token_ids: list[list[int]],
        params: list[SamplingParams],
    ) -> Iterator[RequestOutput]:
        """Yield the outputs of one call, and step the engine while its queue is empty.

        Raises:
            RuntimeError: `close` was called, or an interrupt in another thread ended the requests.
        """
        call = next(self._calls)
        queue: deque[RequestOutput] = deque()
        names = [f"{call}-{index}" for index in range(len(params))]
        prompts = dict(zip(names, texts, strict=True))
        try:
            for name, ids, one in zip(names, token_ids, params, strict=True):
                self._take_turn(partial(self._add, name, ids, one, queue))
            num_running = sum(one.n for one in params)
            while num_running:
                while not queue:
                    self._take_turn(partial(self._step, queue))
                output = queue.popleft()
                num_running -= output.finished
                output.prompt = prompts[output.request_id]
                yield output
        finally:
            with self._lock:
                self._ended += [name for name in names if self._by_request.pop(name, None) is queue]
                if not self._is_used:
                    self._abort_ended()

    def close(self) -> None:
        """Abort unfinished requests and release the model."""
        with self._lock:
            if self._engine is not None:
                self._engine.abort_all()
                ranks = self._engine.runner.info.ranks
                if ranks is not None:
                    ranks.close()
            self._by_request.clear()
            self._engine = None

    def _take_turn(self, work: Callable[[], None]) -> None:
        """Call a function that uses the engine.

        A thread that has used it waits until the next one does. A stream that the garbage collector
        closes inside is aborted at the end. An interrupt may come at each call of a Python
        function, so the lock is released without one.
        """
        try:
            with self._next:
                self._lock.acquire()
            try:
                self._is_used = True
                work()
            finally:
                self._is_used = False
                self._abort_ended()
        finally:
            try:  # noqa: SIM105 - `suppress` is a call, in which an interrupt would keep the lock
                self._lock.release()
            except RuntimeError:
                # the interrupt came before the lock was acquired
                pass

    def _add(
        self, name: str, ids: list[int], params: SamplingParams, queue: deque[RequestOutput]
    ) -> None:
        """Add a request to the engine."""
        # first, so that an interrupt after the request was added aborts it
        self._by_request[name] = queue
        self.engine.add_request(name, ids, params)

    def _abort_ended(self) -> None:
        """Abort the requests whose calls have ended."""
        self._is_used = True
        try:
            while self._ended:
                name = self._ended.pop()
                if self._engine is not None:
                    self._engine.abort_request(name)
        finally:
            self._is_used = False

    def _step(self, queue: deque[RequestOutput]) -> None:
        """Step the engine, and sort the outputs into the queues."""
        # another thread's step may have filled it meanwhile
        if queue:
            return
        engine = self.engine
        if not any(one is queue for one in self._by_request.values()):
            raise RuntimeError("an interrupt in another thread ended the requests of this call")
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
            self._by_request.clear()
            engine.abort_all()
            raise
