"""Engine whose steps calls of several threads share."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
                with self._turn():
                    self.engine.add_request(name, ids, one)
                    self._by_request[name] = queue
            num_running = sum(one.n for one in params)
            while num_running:
                while not queue:
                    with self._turn():
                        # another thread's step may have filled it meanwhile
                        if not queue:
                            self._step(self.engine, queue)
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

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Use the engine inside. A thread that has used it waits until the next one does.

        A stream that the garbage collector closes inside is aborted at the end.
        """
        try:
            with self._next:
                self._lock.acquire()
            try:
                self._is_used = True
                yield
            finally:
                self._abort_ended()
        finally:
            # an interrupt may come before or after the lock is acquired
            with suppress(RuntimeError):
                self._lock.release()

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

    def _step(self, engine: LLMEngine, queue: deque[RequestOutput]) -> None:
        """Step the engine, and sort the outputs into the queues."""
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
